"""How strongly two changes go together, with an interval that respects their dependence.

Points of one layer are no independent witnesses: they are one layer seen at several moments, and
its matrices read and feed each other. So the bootstrap draws whole layers with replacement, every
point of a drawn layer with it; points drawn one by one would give intervals that are far too
narrow. With few layers even these are rough.

Reference: Davison and Hinkley, "Bootstrap Methods and their Application", 1997, section 3.8.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
LEVEL = 0.95
_FEWEST = 3  # points, and layers for an interval: two always lie on a line
_CONSTANT = 1e-9  # spread over size below which values differ by rounding alone

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A correlation and its 95% interval.

    >>> print(Estimate(0.83, 0.5, 0.91), Estimate(-1.0, None, None))
    +0.83 [+0.50, +0.91] -1.00

    Attributes:
        value: From -1 to 1.
        low: Lower end of the interval; None where there are too few layers to tell.
        high: Upper end, or None.
    """

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.value:+.2f}"
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


@dataclass(frozen=True, slots=True)
class Correlation:
    """How the two changes go together over some points.

    Attributes:
        points: Number of points.
        layers: Number of layers that they come from.
        pearson: How close they are to a line; None where it is undefined.
        spearman: How close they are to any rising or falling curve; None likewise.
        reason: Why they are undefined, for people; empty where they are not.
    """

    points: int
    layers: int
    pearson: Estimate | None
    spearman: Estimate | None
    reason: str = ""


def correlate(
    dD: Sequence[float],
    dM: Sequence[float],
    layers: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Correlation:
    """Correlate two changes, and draw whole layers for the intervals.

    Args:
        dD: Change of direction at each point.
        dM: Change of magnitude at each point.
        layers: The layer that each point comes from.
        seed: Of the bootstrap.

    >>> print(correlate([1, 2, 3, 4], [1, 4, 9, 16], "aabb").spearman)
    +1.00
    >>> correlate([1, 2, 3], [5, 5, 5], "abc").reason
    'dD or dM is constant'
    """
    xs, ys = np.asarray(dD, dtype=np.float64), np.asarray(dM, dtype=np.float64)
    names, cluster = np.unique([str(layer) for layer in layers], return_inverse=True)
    once = np.ones(len(xs))
    pearson, ranks = _pearson(xs, ys, once), _RankCorrelation(xs, ys)
    spearman = ranks(once)
    reason = ""
    if len(xs) < _FEWEST:
        reason = "fewer than 3 points"
    elif pearson is None or spearman is None:
        reason = "dD or dM is constant"
    if reason or pearson is None or spearman is None:
        return Correlation(len(xs), len(names), None, None, reason)
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    times = drawn[:, cluster].astype(np.float64)  # (resamples, points): how often each is drawn
    return Correlation(
        points=len(xs),
        layers=len(names),
        pearson=_estimate(pearson, lambda w: _pearson(xs, ys, w), times, len(names)),
        spearman=_estimate(spearman, ranks, times, len(names)),
    )


def _estimate(
    value: float, statistic: Callable[[Floats], float | None], times: Floats, layers: int
) -> Estimate:
    if layers < _FEWEST:
        return Estimate(value, None, None)
    drawn = [found for weights in times if (found := statistic(weights)) is not None]
    if len(drawn) < len(times) / 2:
        return Estimate(value, None, None)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high))


class _RankCorrelation:
    """Spearman's correlation of points that are each counted some number of times.

    Args:
        x: One quantity at each point.
        y: The other.
    """

    def __init__(self, x: Floats, y: Floats) -> None:
        self._places = [np.unique(values, return_inverse=True)[1] for values in (x, y)]

    def __call__(self, weights: Floats) -> float | None:
        x, y = (_mean_ranks(place, weights) for place in self._places)
        return _pearson(x, y, weights)


def _mean_ranks(place: npt.NDArray[np.intp], weights: Floats) -> Floats:
    """Return ranks from 1, ties sharing their mean, of values counted ``weights`` times."""
    counts = np.bincount(place, weights)
    ranks: Floats = np.cumsum(counts) - (counts - 1) / 2
    return ranks[place]


def _pearson(x: Floats, y: Floats, weights: Floats) -> float | None:
    weights = weights / weights.sum()
    from_mean = [values - weights @ values for values in (x, y)]
    spreads = [np.sqrt(weights @ np.square(values)) for values in from_mean]
    sizes = [np.sqrt(weights @ np.square(values)) for values in (x, y)]
    if any(s <= _CONSTANT * size for s, size in zip(spreads, sizes, strict=True)):
        return None
    together = weights @ (from_mean[0] * from_mean[1])
    return float(np.clip(together / (spreads[0] * spreads[1]), -1, 1))
