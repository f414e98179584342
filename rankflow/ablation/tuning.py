"""Which learning rate to try next, and when to stop: a pure function of what was measured.

The grid goes on in factors of 2 until a worse rate has been measured on either side of the best,
so that no method is judged at the edge of a grid that suited another one. Scalings, where a method
asks for them, are tried at the best rate; a better one is bracketed anew.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """What tuning chooses: a learning rate, and a factor on the adapter's scale."""

    rate: float
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Where tuning starts, and how far it may go.

    Attributes:
        rates: Learning rates to start with.
        scalings: Factors on the adapter's scale; the first is the one to start with.
        widest: Factor below the smallest and above the largest first rate that is still tried.
    """

    rates: tuple[float, ...]
    scalings: tuple[float, ...] = (1.0,)
    widest: float = 16.0

    def allows(self, rate: float) -> bool:
        """Whether a rate is within bounds."""
        low, high = min(self.rates) / self.widest, max(self.rates) * self.widest
        return low * (1 - 1e-9) <= rate <= high * (1 + 1e-9)


def next_points(found: Mapping[Point, float], grid: Grid) -> list[Point]:
    """Return the points to measure next; none when the best is settled.

    Args:
        found: Loss at each measured point, lower is better; infinite where training failed.
        grid: Where to start, and how far to go.

    >>> grid = Grid(rates=(0.004, 0.008))
    >>> next_points({}, grid)
    [Point(rate=0.004, scaling=1.0), Point(rate=0.008, scaling=1.0)]
    >>> next_points({Point(0.004): 0.5, Point(0.008): 0.6}, grid)
    [Point(rate=0.002, scaling=1.0)]
    """
    scale = grid.scalings[0]
    missing = [Point(rate, scale) for rate in grid.rates if Point(rate, scale) not in found]
    if missing:
        return missing
    best = best_point(found)
    beside = [Point(best.rate * factor, best.scaling) for factor in (0.5, 2)]
    missing = [p for p in beside if not _is_measured(p, found) and grid.allows(p.rate)]
    if missing:
        return missing
    return [
        point
        for point in (Point(best.rate, scaling) for scaling in grid.scalings)
        if not _is_measured(point, found)
    ]


def best_point(found: Mapping[Point, float]) -> Point:
    """Return the point of the smallest loss; of equals the smallest rate."""
    return min(sorted(found), key=found.__getitem__)


def mean_losses(losses: Mapping[Point, Sequence[float]]) -> dict[Point, float]:
    """Average the seeds of each point; a run that failed or diverged makes it infinite.

    The sum is exact, so that the mean does not depend on which seed ended first.
    """
    return {
        point: math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.inf
        for point, values in losses.items()
    }


def _is_measured(point: Point, found: Mapping[Point, float]) -> bool:
    return any(
        math.isclose(point.rate, other.rate) and point.scaling == other.scaling for other in found
    )
