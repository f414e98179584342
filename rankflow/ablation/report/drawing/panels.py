"""A grid of panels: points of methods with intervals, in axes that fit the points."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rankflow.ablation.report.drawing.style import INK, LABEL_POINTS, MethodStyle, new_figure
from rankflow.ablation.statistics.spread import Spread

_REACH: Final = 0.75
"""How far axes may go beyond the means for the sake of intervals, in ranges of the means."""

_USUAL: Final = 1.5
"""The same in usual intervals; the larger counts."""

_DECADES: Final = 30.0
"""Ratio of the means beyond which an axis is logarithmic."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        mean: The mean, finite.
        low: Lower end of the interval; NaN for none.
        high: Upper end.
        hollow: Whether it is not over all seeds, because some diverged.
    """

    mean: float
    low: float
    high: float
    hollow: bool = False

    @classmethod
    def of(cls, spread: Spread) -> "Estimate | None":
        """Return the mean of a method's scores; None without a finite one."""
        if not spread.n:
            return None
        return cls(spread.mean, spread.low, spread.high, hollow=spread.broken > 0)


def panel_grid(
    rows: int, columns: int, width: float, height: float, extra: float = 0.0
) -> tuple[Figure, list[list[Axes]]]:
    """Return a figure with panels of a size in inches, and room for a legend beneath."""
    figure = new_figure(width * columns, height * rows + extra)
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, [list(line) for line in grid]


def wrap(count: int, most: int) -> tuple[int, int]:
    """Return the rows and columns of a grid for so many panels.

    >>> wrap(2, most=3), wrap(4, most=3)
    ((1, 2), (2, 3))
    """
    return math.ceil(count / most), min(count, most)


def axis_limits(estimates: Iterable[Estimate], also: Sequence[float] = ()) -> tuple[float, float]:
    """Return limits that hold all means, and intervals as far as they do not dwarf the means.

    Args:
        estimates: What is drawn.
        also: Values that must be in sight.
    """
    estimates = list(estimates)
    inner = [estimate.mean for estimate in estimates] + list(also)
    low, high = min(inner), max(inner)
    span = (high - low) or abs(high) or 1.0
    known = [e for e in estimates if math.isfinite(e.low)]
    ends = [end for e in known for end in (e.low, e.high)]
    usual = median([(e.high - e.low) / 2 for e in known]) if known else 0.0
    reach = max(_REACH * span, _USUAL * usual)
    low_end = max(min([low, *ends]), low - reach)
    high_end = min(max([high, *ends]), high + reach)
    margin = 0.06 * (high_end - low_end or span)
    return low_end - margin, high_end + margin


def scale_horizontal(axes: Axes, estimates: Iterable[Estimate], also: Sequence[float] = ()) -> None:
    """Fit the horizontal axis to the means; few ticks, so that long labels do not touch."""
    axes.set_xlim(*axis_limits(estimates, also))
    axes.xaxis.set_major_locator(MaxNLocator(4))


def scale_vertical(axes: Axes, estimates: Sequence[Estimate]) -> None:
    """Fit the vertical axis to the means; a logarithmic one where they span decades."""
    if not estimates:
        return
    means = [estimate.mean for estimate in estimates]
    if min(means) > 0 and max(means) > _DECADES * min(means):
        axes.set_yscale("log")
        axes.set_ylim(min(means) / 2, max(means) * 2)
    else:
        axes.set_ylim(*axis_limits(estimates))


def draw_estimate(
    axes: Axes,
    at: float,
    estimate: Estimate,
    style: MethodStyle,
    *,
    across: bool = False,
) -> None:
    """Draw a mean as the method's marker, with its interval.

    Args:
        axes: Where.
        at: Place on the other axis.
        estimate: The mean, on the vertical axis.
        style: Of the method.
        across: Whether the mean is on the horizontal axis instead.
    """
    ends = (estimate.low, estimate.high)
    if math.isfinite(estimate.low):
        fixed = (at, at)
        axes.plot(
            *((ends, fixed) if across else (fixed, ends)),
            color=style.colour,
            linewidth=1.1,
            alpha=0.75,
            zorder=2,
        )
    axes.plot(
        *((estimate.mean, at) if across else (at, estimate.mean)),
        marker=style.marker,
        markersize=5.5,
        markerfacecolor="white" if estimate.hollow else style.colour,
        markeredgecolor=style.colour,
        linestyle="none",
        zorder=3,
    )


def add_legend(
    figure: Figure, styles: dict[str, MethodStyle], extra: Sequence[Line2D] = (), columns: int = 5
) -> None:
    """Name the methods under the panels, those without a colour of their own as others."""
    handles = [
        Line2D([], [], color=s.colour, marker=s.marker, linewidth=1.2, markersize=5.5, label=name)
        for name, s in styles.items()
        if s.listed
    ]
    rest = [style for style in styles.values() if not style.listed]
    if rest:
        colour, marker = rest[0].colour, rest[0].marker
        label = f"{len(rest)} others"
        handles.append(Line2D([], [], color=colour, marker=marker, linewidth=1.2, label=label))
    figure.legend(
        handles=[*handles, *extra],
        loc="outside lower left",
        ncols=columns,
        frameon=False,
        fontsize=LABEL_POINTS,
        labelcolor=INK,
        handlelength=1.8,
    )
