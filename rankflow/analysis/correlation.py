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
_PARTS = 10  # in which the resamples are worked through, to bound memory
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
    if len(xs) < _FEWEST:
        return Correlation(len(xs), len(names), None, None, f"fewer than {_FEWEST} points")
    random = np.random.default_rng(seed)
    drawn = random.multinomial(len(names), [1 / len(names)] * len(names), size=RESAMPLES)
    times = drawn[:, cluster].astype(np.float64)  # (resamples, points): how often each is drawn
    pearson = _estimate(lambda weights: _pearson(xs, ys, weights), times, len(names))
    spearman = _estimate(
        lambda weights: _pearson(_mean_ranks(xs, weights), _mean_ranks(ys, weights), weights),
        times,
        len(names),
    )
    if pearson is None or spearman is None:
        return Correlation(len(xs), len(names), None, None, "dD or dM is constant")
    return Correlation(len(xs), len(names), pearson, spearman)


def _estimate(statistic: Callable[[Floats], Floats], times: Floats, layers: int) -> Estimate | None:
    (value,) = statistic(np.ones((1, times.shape[1])))
    if np.isnan(value):
        return None
    found = np.concatenate([statistic(part) for part in np.array_split(times, _PARTS)])
    defined = found[~np.isnan(found)]
    if layers < _FEWEST or len(defined) < len(found) / 2:
        return Estimate(float(value), None, None)
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(value), float(low), float(high))


def _mean_ranks(values: Floats, weights: Floats) -> Floats:
    """Rank values from 1, ties sharing their mean, where each is there ``weights`` times.

    Args:
        values: Shape ``(points,)``.
        weights: Shape ``(resamples, points)``.

    Returns:
        Shape ``(resamples, points)``.
    """
    order = np.argsort(values, kind="stable")
    _, starts, place = np.unique(values[order], return_index=True, return_inverse=True)
    counts = np.add.reduceat(weights[:, order], starts, axis=1)  # (resamples, distinct values)
    ranks: Floats = np.empty_like(weights)
    ranks[:, order] = (np.cumsum(counts, axis=1) - (counts - 1) / 2)[:, place]
    return ranks


def _pearson(x: Floats, y: Floats, weights: Floats) -> Floats:
    """Correlate points that are there ``weights`` times; nan where one of the two is constant.

    Args:
        x: Shape ``(points,)`` or ``(resamples, points)``.
        y: Likewise.
        weights: Shape ``(resamples, points)``.

    Returns:
        Shape ``(resamples,)``.
    """
    weights = weights / weights.sum(axis=1, keepdims=True)
    a, b = (values - (weights * values).sum(axis=1, keepdims=True) for values in (x, y))
    spreads = [np.sqrt((weights * np.square(values)).sum(axis=1)) for values in (a, b)]
    sizes = [np.sqrt((weights * np.square(values)).sum(axis=1)) for values in (x, y)]
    is_constant = (spreads[0] <= _CONSTANT * sizes[0]) | (spreads[1] <= _CONSTANT * sizes[1])
    with np.errstate(invalid="ignore", divide="ignore"):
        found = (weights * a * b).sum(axis=1) / (spreads[0] * spreads[1])
    return np.where(is_constant, np.nan, np.clip(found, -1, 1))
