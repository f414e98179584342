"""Heatmaps of ranks and of importance, as matplotlib figures.

The figures are drawn without pyplot: they leave no global state behind, need no display, and may
be made in a training process. A site that does not exist leaves its place empty; a site with
nothing left (rank 0, no importance) is grey; everything else has a colour of the scale.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from rankflow.report.geometry import (
    LABEL_POINTS,
    POINTS,
    TITLE_POINTS,
    CellGeometry,
    PageGeometry,
    measure_cells,
    measure_page,
    row_positions,
)
from rankflow.report.layout import Cell, GridLayout, lay_out
from rankflow.report.palette import BROKEN, DARK_INK, NOTHING, RAMP, RGB, hex_of, ink_on, shade
from rankflow.report.statistics import per_parameter

MOST_NUMBERS = 1200
DECADES = 4
CELL_GAP = 0.03  # between two cells, in inches
_DOT = 0.2  # diameter of a dot, in cells

_COLOURS = LinearSegmentedColormap.from_list("rankflow", [hex_of(colour) for colour in RAMP])


@dataclass(frozen=True, slots=True)
class ColourScale:
    """How a value becomes a colour.

    Attributes:
        norm: From a positive value to a point of the ramp.
        label: What the values are, with their unit.
        nothing: Legend of the values that are zero or below.
        whole: Whether the values are whole numbers, to be written into the cells.
    """

    norm: Normalize
    label: str
    nothing: str
    whole: bool

    def colour_of(self, value: float) -> RGB:
        """Return the colour of one cell."""
        if not math.isfinite(value):
            return BROKEN
        return shade(float(self.norm(value))) if value > 0 else NOTHING


def rank_heatmap(
    ranks: Mapping[str, int],
    *,
    title: str = "Rank",
    maximum: int | None = None,
    magnitudes: Mapping[str, bool] | None = None,
) -> Figure:
    """Draw the rank of each site, with a dot where it trains a magnitude.

    Args:
        ranks: Rank of each site, by site name; at least one site.
        title: Written above the grid.
        maximum: Rank at the top of the colour scale; give the same one to figures that are to be
            compared. None takes the largest rank.
        magnitudes: Whether each site trains a DoRA magnitude, by site name; None draws no dots.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    top = max(maximum or 0, *ranks.values(), 2)
    scale = ColourScale(Normalize(1, top), "rank", "rank 0", whole=True)
    dotted = [site for site, on in (magnitudes or {}).items() if on]
    return _draw(ranks, scale, title, dotted)


def importance_heatmap(
    importance: Mapping[str, float],
    *,
    title: str = "Importance",
    costs: Mapping[str, int] | None = None,
) -> Figure:
    """Draw the importance of each site on a logarithmic scale of at most four decades.

    Args:
        importance: Sum of the scores of each site's components, by site name; at least one site.
        title: Written above the grid.
        costs: Trainable parameters of each site, by site name; if given, the figure shows the
            importance per parameter.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    values = importance if costs is None else per_parameter(importance, costs)
    label = "importance" if costs is None else "importance per parameter"
    return _draw(values, ColourScale(_log_norm(values), label, "none (≤ 0)", whole=False), title)


def render_pixels(figure: Figure, *, dots_per_inch: int = 110) -> npt.NDArray[np.uint8]:
    """Return the figure as pixels.

    Args:
        figure: What ``rank_heatmap`` or ``importance_heatmap`` returned.
        dots_per_inch: Resolution; the larger, the larger the array.

    Returns:
        Red, green and blue, shape ``(height, width, 3)``.
    """
    figure.set_dpi(dots_per_inch)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def _log_norm(values: Mapping[str, float]) -> LogNorm:
    positive = [value for value in values.values() if value > 0 and math.isfinite(value)]
    top = max(positive, default=1.0)
    bottom = max(min(positive, default=top), top / 10**DECADES)
    return LogNorm(min(bottom, top / 10), top, clip=True)


def _draw(
    values: Mapping[str, float], scale: ColourScale, title: str, dotted: Sequence[str] = ()
) -> Figure:
    layout = lay_out(values)
    cells = measure_cells(layout)
    page = measure_page(layout, cells, title)
    colours = {site: scale.colour_of(value) for site, value in values.items()}

    figure = Figure(figsize=(page.width, page.height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(page.left, page.title, title, fontsize=TITLE_POINTS, fontweight="bold", va="top")
    axes = figure.add_axes(page.grid)
    _label_axes(axes, layout, cells)
    patches = _draw_cells(axes, colours, layout, cells)
    if scale.whole and len(values) <= MOST_NUMBERS:
        for site, value in values.items():
            _write_number(axes, patches[site], value, colours[site], cells)
    for site in dotted:
        _draw_dot(axes, patches[site], colours[site], cells)
    _draw_scale(figure, scale, page)
    entries: list[Artist] = [*_legend_entries(colours, layout, scale)]
    if dotted:
        entries.append(_legend_dot())
    _draw_legend(figure, entries, page)
    return figure


def _draw_cells(
    axes: Axes, colours: Mapping[str, RGB], layout: GridLayout, cells: CellGeometry
) -> dict[str, Rectangle]:
    tops = row_positions(layout)
    patches = {site: _rectangle(layout.cells[site], tops, cells) for site in colours}
    faces = [hex_of(colour) for colour in colours.values()]
    axes.add_collection(PatchCollection(list(patches.values()), facecolors=faces))
    axes.set(xlim=(0, len(layout.columns)), ylim=(tops[-1] + 1, 0))
    return patches


def _rectangle(cell: Cell, tops: list[float], cells: CellGeometry) -> Rectangle:
    across, down = CELL_GAP / cells.width, CELL_GAP / cells.height
    corner = (cell.column + across / 2, tops[cell.row] + down / 2)
    return Rectangle(corner, cell.span - across, 1 - down)


def _write_number(
    axes: Axes, patch: Rectangle, value: float, colour: RGB, cells: CellGeometry
) -> None:
    x, y = patch.get_center()
    axes.text(
        x,
        y,
        f"{value:.0f}",
        fontsize=cells.number_points,
        color=hex_of(ink_on(colour)),
        ha="center",
        va="center_baseline",
    )


def _draw_dot(axes: Axes, patch: Rectangle, colour: RGB, cells: CellGeometry) -> None:
    """Put a dot into the upper right corner of a cell, as far from both edges."""
    size = _DOT * min(cells.width, cells.height)
    x = patch.get_x() + patch.get_width() - size / cells.width
    y = patch.get_y() + size / cells.height
    ink = hex_of(ink_on(colour))
    axes.plot(x, y, "o", color=ink, markersize=POINTS * size, markeredgewidth=0)


def _legend_dot() -> Line2D:
    ink = hex_of(DARK_INK)
    return Line2D([], [], linestyle="none", marker="o", color=ink, markersize=4, label="magnitude")


def _label_axes(axes: Axes, layout: GridLayout, cells: CellGeometry) -> None:
    centres = [top + 0.5 for top in row_positions(layout)]
    axes.set_yticks(centres, layout.rows, fontsize=cells.row_points)
    axes.set_xticks(
        [column + 0.5 for column in range(len(layout.columns))],
        cells.columns,
        fontsize=cells.column_points,
        rotation=90 if cells.upright else 0,
    )
    axes.tick_params(length=0, pad=3, labelcolor=hex_of(DARK_INK))
    axes.xaxis.tick_top()
    axes.spines[:].set_visible(False)


def _draw_scale(figure: Figure, scale: ColourScale, page: PageGeometry) -> None:
    axes = figure.add_axes(page.scale)
    bar = figure.colorbar(ScalarMappable(scale.norm, _COLOURS), cax=axes)
    bar.set_label(scale.label, fontsize=LABEL_POINTS)
    if scale.whole:
        bar.set_ticks(_whole_ticks(scale.norm))
    bar.ax.tick_params(labelsize=LABEL_POINTS - 1, length=2)
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _whole_ticks(norm: Normalize) -> list[int]:
    """Return every whole number of a short scale, or six of a long one; always both ends."""
    bottom, top = round(norm.vmin or 0), round(norm.vmax or 0)
    count = top - bottom + 1
    return sorted({round(tick) for tick in np.linspace(bottom, top, count if count <= 8 else 6)})


def _legend_entries(
    colours: Mapping[str, RGB], layout: GridLayout, scale: ColourScale
) -> list[Patch]:
    shown = set(colours.values())
    covered = sum(cell.span for cell in layout.cells.values())
    entries = []
    if NOTHING in shown:
        entries.append(Patch(facecolor=hex_of(NOTHING), label=scale.nothing))
    if BROKEN in shown:
        entries.append(Patch(facecolor=hex_of(BROKEN), label="not finite"))
    if covered < len(layout.rows) * len(layout.columns):
        entries.append(Patch(facecolor="white", edgecolor=hex_of(NOTHING), label="no adapter"))
    return entries


def _draw_legend(figure: Figure, entries: list[Artist], page: PageGeometry) -> None:
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(page.left, page.legend),
        ncols=4,
        frameon=False,
        fontsize=LABEL_POINTS,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.2,
        handleheight=1.0,
    )
