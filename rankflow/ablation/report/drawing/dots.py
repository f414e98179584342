"""One number of every method with its interval: a panel for each task and budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rankflow.ablation.report.drawing.panels import (
    Estimate,
    draw_estimate,
    panel_grid,
    scale_horizontal,
)
from rankflow.ablation.report.drawing.style import INK, LABEL_POINTS, MethodStyle, tidy


@dataclass(frozen=True, slots=True)
class DotPanel:
    """One panel.

    Attributes:
        estimates: By method, from the top.
        reference: A value that they are held against; None for none.
    """

    estimates: Mapping[str, Estimate]
    reference: float | None = None


def draw_dots(
    panels: Sequence[Sequence[tuple[str, DotPanel]]],
    styles: Mapping[str, MethodStyle],
    *,
    label: str,
    reference: str = "",
) -> Figure:
    """Draw the panels in a grid; panels of one column share their scale.

    Args:
        panels: Title and content of each, by line.
        styles: Of each method.
        label: What the number is.
        reference: What the reference is; empty for none.
    """
    methods = [
        method
        for method in styles
        if any(method in panel.estimates for line in panels for _, panel in line)
    ]
    figure, grid = panel_grid(
        len(panels), len(panels[0]), 3.6, 0.75 + 0.22 * len(methods), extra=0.35
    )
    for row, line in enumerate(panels):
        for column, (title, panel) in enumerate(line):
            axes = grid[row][column]
            _draw_panel(axes, panel, methods, styles, named=column == 0)
            tidy(axes, title)
            axes.grid(visible=False, axis="y")
            axes.tick_params(axis="y", length=0)
            if row == len(panels) - 1:
                axes.set_xlabel(label)
    for column in range(len(panels[0])):
        _share_scale([grid[row][column] for row in range(len(panels))], [x[column] for x in panels])
    if reference:
        line_handle = Line2D([], [], color=INK, linestyle="--", linewidth=1, label=reference)
        figure.legend(
            handles=[line_handle], loc="outside lower left", frameon=False, fontsize=LABEL_POINTS
        )
    return figure


def _draw_panel(
    axes: Axes,
    panel: DotPanel,
    methods: Sequence[str],
    styles: Mapping[str, MethodStyle],
    named: bool,
) -> None:
    if panel.reference is not None:
        axes.axvline(panel.reference, color=INK, linestyle="--", linewidth=1, zorder=1)
    for place, method in enumerate(methods):
        if method in panel.estimates:
            draw_estimate(axes, place, panel.estimates[method], styles[method], across=True)
    axes.set_yticks(range(len(methods)), methods if named else [""] * len(methods))
    axes.set_ylim(len(methods) - 0.5, -0.5)


def _share_scale(axes: Sequence[Axes], panels: Sequence[tuple[str, DotPanel]]) -> None:
    estimates = [e for _, panel in panels for e in panel.estimates.values()]
    references = [panel.reference for _, panel in panels if panel.reference is not None]
    if estimates:
        for own in axes:
            scale_horizontal(own, estimates, references)
