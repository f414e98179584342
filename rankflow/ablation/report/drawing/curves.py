"""Quality against budget: a panel for each task, a line for each method."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rankflow.ablation.report.drawing.panels import (
    Estimate,
    add_legend,
    draw_estimate,
    panel_grid,
    scale_vertical,
    wrap,
)
from rankflow.ablation.report.drawing.style import MethodStyle, tidy

_DODGE: Final = 0.03
"""Shift between two methods at one budget, in doublings, so that intervals do not hide."""

_WIDEST: Final = 0.25
"""Most that all methods at one budget are spread, in doublings."""

Curve = Mapping[float, Estimate]
"""Estimate by budget."""


@dataclass(frozen=True, slots=True)
class CurveAxes:
    """What the axes of the curves are.

    Attributes:
        budget: Name of the horizontal axis.
        ticks: Label of each budget.
        metric: Name of the vertical axis.
    """

    budget: str
    ticks: Mapping[float, str]
    metric: str


def draw_curves(
    tasks: Mapping[str, Mapping[str, Curve]], styles: dict[str, MethodStyle], axes: CurveAxes
) -> Figure:
    """Draw the curves of every method on every task, over a logarithmic budget.

    Args:
        tasks: Curves by task and method.
        styles: Of each method.
        axes: What the axes are.
    """
    rows, columns = wrap(len(tasks), most=3)
    figure, grid = panel_grid(rows, columns, 3.9 if columns > 1 else 5.6, 3.1, extra=0.5)
    panels = [panel for line in grid for panel in line]
    for panel, (task, curves) in zip(panels, tasks.items(), strict=False):
        _draw_panel(panel, curves, styles, axes)
        tidy(panel, task)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    shown = {m: s for m, s in styles.items() if any(curves.get(m) for curves in tasks.values())}
    add_legend(figure, shown, columns=min(4 * columns - 1, 7))
    return figure


def _draw_panel(
    panel: Axes, curves: Mapping[str, Curve], styles: Mapping[str, MethodStyle], axes: CurveAxes
) -> None:
    panel.set_xscale("log", base=2)
    order: Sequence[str] = sorted(curves, key=lambda method: styles[method].listed)
    dodge = min(_DODGE, _WIDEST / max(len(order), 1))
    for place, method in enumerate(order):
        style, shift = styles[method], 2 ** (dodge * (place - (len(order) - 1) / 2))
        points = [(budget * shift, e) for budget, e in sorted(curves[method].items())]
        panel.plot(
            [x for x, _ in points],
            [e.mean for _, e in points],
            color=style.colour,
            linewidth=1.3,
            zorder=2,
        )
        for x, estimate in points:
            bare = replace(estimate, low=math.nan, high=math.nan)
            draw_estimate(panel, x, estimate if style.listed else bare, style)
    scale_vertical(panel, [e for curve in curves.values() for e in curve.values()])
    budgets = sorted(axes.ticks)
    panel.set_xlim(budgets[0] / math.sqrt(1.8), budgets[-1] * math.sqrt(1.8))
    panel.set_xticks(budgets, [axes.ticks[budget] for budget in budgets])
    panel.minorticks_off()
    panel.set(xlabel=axes.budget, ylabel=axes.metric)
