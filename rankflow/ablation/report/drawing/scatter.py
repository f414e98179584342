"""Quality against what it takes at inference: a panel for each task and budget."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rankflow.ablation.report.drawing.panels import (
    Estimate,
    add_legend,
    draw_estimate,
    panel_grid,
    scale_horizontal,
    scale_vertical,
)
from rankflow.ablation.report.drawing.style import FAINT, INK, MethodStyle, tidy


@dataclass(frozen=True, slots=True)
class Price:
    """What a method reaches, and what it takes.

    Attributes:
        quality: The judged metric.
        unmerged: Price as it was trained.
        merged: Price with the adaptation folded in; None where that cannot be done.
    """

    quality: Estimate
    unmerged: float
    merged: float | None


def draw_scatter(
    panels: Sequence[Sequence[tuple[str, Mapping[str, Price]]]],
    styles: dict[str, MethodStyle],
    *,
    price: str,
    metric: str,
) -> Figure:
    """Draw every method as a point, with a thin line to the cross where merging brings it.

    Args:
        panels: Title of each panel, and its points by method, by line.
        styles: Of each method.
        price: Name of the horizontal axis.
        metric: Name of the vertical axis.
    """
    figure, grid = panel_grid(len(panels), len(panels[0]), 3.6, 2.7, extra=0.5)
    shown: dict[str, MethodStyle] = {}
    merges = False
    for row, line in enumerate(panels):
        for column, (title, points) in enumerate(line):
            axes = grid[row][column]
            for method, point in points.items():
                _draw_point(axes, point, styles[method])
                merges |= point.merged is not None
            _limit(axes, list(points.values()))
            tidy(axes, title)
            axes.set(xlabel=price if row == len(panels) - 1 else "")
            axes.set(ylabel=metric if column == 0 else "")
            shown |= {method: styles[method] for method in points}
    cross = Line2D([], [], color=FAINT, marker="x", linewidth=0.8, label="merged")
    ordered = {method: style for method, style in styles.items() if method in shown}
    figure.align_ylabels()
    columns = min(4 * len(panels[0]) - 1, 7)
    add_legend(figure, ordered, extra=[cross] if merges else [], columns=columns)
    return figure


def _draw_point(axes: Axes, point: Price, style: MethodStyle) -> None:
    y = point.quality.mean
    if point.merged is not None:
        ends = [point.merged, point.unmerged]
        axes.plot(ends, [y, y], color=style.colour, linewidth=0.8, alpha=0.5)
        axes.plot(point.merged, y, marker="x", color=style.colour, markersize=5)
    draw_estimate(axes, point.unmerged, point.quality, style)


def _limit(axes: Axes, points: Sequence[Price]) -> None:
    if not points:
        axes.text(0.5, 0.5, "not measured", ha="center", color=INK, transform=axes.transAxes)
        return
    prices = [p for point in points for p in (point.unmerged, point.merged) if p is not None]
    exact = [Estimate(price, math.nan, math.nan) for price in prices]
    scale_horizontal(axes, exact)
    scale_vertical(axes, [point.quality for point in points])
