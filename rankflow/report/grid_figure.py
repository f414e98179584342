"""A grid of coloured cells as a matplotlib figure, with labels, a colour scale and a legend.

Figures are drawn without pyplot: they leave no global state behind, need no display, and may be
made in a training process.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.collections import PatchCollection
from matplotlib.colors import Colormap, Normalize
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
from rankflow.report.layout import Cell, GridLayout
from rankflow.report.palette import DARK_INK, NOTHING, RGB, hex_of, ink_on

MOST_TEXTS = 1200
CELL_GAP = 0.03  # between two cells, in inches
_DOT = 0.2  # diameter of a dot, in cells

Dot = Literal["filled", "hollow"]


@dataclass(frozen=True, slots=True)
class PaintedCell:
    """How a site's cell looks.

    Attributes:
        colour: Of the cell.
        text: Written into it, unless there are too many cells.
        dot: What stands in its upper right corner.
    """

    colour: RGB
    text: str = ""
    dot: Dot | None = None


@dataclass(frozen=True, slots=True)
class ColourBar:
    """The colour scale beside the grid.

    Attributes:
        norm: From a value to a point of the scale.
        colours: Of the scale.
        label: What the values are, with their unit.
        ticks: The values that are written; None leaves the choice to matplotlib.
    """

    norm: Normalize
    colours: Colormap
    label: str
    ticks: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class Meanings:
    """What the legend says; what is on no cell is left out.

    Attributes:
        colours: Colours outside the scale.
        dots: The dots.
    """

    colours: Mapping[RGB, str]
    dots: Mapping[Dot, str]


def draw_grid(
    layout: GridLayout,
    painted: Mapping[str, PaintedCell],
    bar: ColourBar,
    meanings: Meanings,
    title: str,
) -> Figure:
    """Draw a grid.

    Args:
        layout: Place of each site.
        painted: How each site's cell looks, by site name.
        bar: The colour scale.
        meanings: What the legend says.
        title: Written above the grid.

    Returns:
        A figure with an Agg canvas.
    """
    cells = measure_cells(layout)
    page = measure_page(layout, cells, title)
    figure = Figure(figsize=(page.width, page.height), facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(page.left, page.title, title, fontsize=TITLE_POINTS, fontweight="bold", va="top")
    axes = figure.add_axes(page.grid)
    _label_axes(axes, layout, cells)
    patches = _draw_cells(axes, painted, layout, cells)
    for site, cell in painted.items():
        if cell.text and len(painted) <= MOST_TEXTS:
            _write_text(axes, patches[site], cell, cells)
        if cell.dot is not None:
            _draw_dot(axes, patches[site], cell, cells)
    _draw_bar(figure, bar, page)
    _draw_legend(figure, _legend_entries([*painted.values()], layout, meanings), page)
    return figure


def render_pixels(figure: Figure, *, dots_per_inch: int = 110) -> npt.NDArray[np.uint8]:
    """Return a figure as pixels.

    Args:
        figure: A heatmap.
        dots_per_inch: Resolution; the larger, the larger the array.

    Returns:
        Red, green and blue, shape ``(height, width, 3)``.
    """
    figure.set_dpi(dots_per_inch)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba(), dtype=np.uint8)[..., :3]


def _draw_cells(
    axes: Axes, painted: Mapping[str, PaintedCell], layout: GridLayout, cells: CellGeometry
) -> dict[str, Rectangle]:
    tops = row_positions(layout)
    patches = {site: _rectangle(layout.cells[site], tops, cells) for site in painted}
    faces = [hex_of(cell.colour) for cell in painted.values()]
    axes.add_collection(PatchCollection(list(patches.values()), facecolors=faces))
    axes.set(xlim=(0, len(layout.columns)), ylim=(tops[-1] + 1, 0))
    return patches


def _rectangle(cell: Cell, tops: list[float], cells: CellGeometry) -> Rectangle:
    across, down = CELL_GAP / cells.width, CELL_GAP / cells.height
    corner = (cell.column + across / 2, tops[cell.row] + down / 2)
    return Rectangle(corner, cell.span - across, 1 - down)


def _write_text(axes: Axes, patch: Rectangle, cell: PaintedCell, cells: CellGeometry) -> None:
    x, y = patch.get_center()
    axes.text(
        x,
        y,
        cell.text,
        fontsize=cells.number_points,
        color=hex_of(ink_on(cell.colour)),
        ha="center",
        va="center_baseline",
    )


def _draw_dot(axes: Axes, patch: Rectangle, cell: PaintedCell, cells: CellGeometry) -> None:
    """Put a dot into the upper right corner of a cell, as far from both edges."""
    size = _DOT * min(cells.width, cells.height)
    x = patch.get_x() + patch.get_width() - size / cells.width
    y = patch.get_y() + size / cells.height
    ink = hex_of(ink_on(cell.colour))
    face = ink if cell.dot == "filled" else "none"
    edge = 0.0 if cell.dot == "filled" else 0.7
    axes.plot(
        x, y, "o", color=ink, markersize=POINTS * size, markerfacecolor=face, markeredgewidth=edge
    )


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


def _draw_bar(figure: Figure, bar: ColourBar, page: PageGeometry) -> None:
    axes = figure.add_axes(page.scale)
    drawn = figure.colorbar(ScalarMappable(bar.norm, bar.colours), cax=axes)
    drawn.set_label(bar.label, fontsize=LABEL_POINTS)
    if bar.ticks is not None:
        drawn.set_ticks(list(bar.ticks))
    drawn.ax.tick_params(labelsize=LABEL_POINTS - 1, length=2)
    drawn.minorticks_off()
    drawn.outline.set_visible(False)


def _legend_entries(
    painted: Sequence[PaintedCell], layout: GridLayout, meanings: Meanings
) -> list[Artist]:
    colours = {cell.colour for cell in painted}
    dots = {cell.dot for cell in painted}
    entries: list[Artist] = [
        Patch(facecolor=hex_of(colour), label=meaning)
        for colour, meaning in meanings.colours.items()
        if colour in colours
    ]
    covered = sum(cell.span for cell in layout.cells.values())
    if covered < len(layout.rows) * len(layout.columns):
        entries.append(Patch(facecolor="white", edgecolor=hex_of(NOTHING), label="no adapter"))
    return entries + [_legend_dot(d, meaning) for d, meaning in meanings.dots.items() if d in dots]


def _legend_dot(dot: Dot, meaning: str) -> Line2D:
    ink = hex_of(DARK_INK)
    face = ink if dot == "filled" else "none"
    return Line2D(
        [],
        [],
        linestyle="none",
        marker="o",
        color=ink,
        markerfacecolor=face,
        markersize=4,
        label=meaning,
    )


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
