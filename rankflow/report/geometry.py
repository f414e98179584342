"""Where the parts of a heatmap stand on the page, in inches.

Cells shrink as their number grows, the page grows with them, and the margins follow the labels:
6 layers and 80 layers both keep labels that can be read. Matplotlib's own layout engines do the
reverse (a page of fixed size), so the places are worked out here.
"""

from dataclasses import dataclass

from rankflow.report.layout import GridLayout

POINTS = 72.0
GROUP_GAP = 0.35  # between two stacks, in cells
TITLE_POINTS = 11.0
LABEL_POINTS = 8.0

_CHARACTER = 0.6  # mean width of a character of DejaVu Sans over its size
_LINE = 1.25  # height of a line of text over its size
_EDGE = 0.15
_TITLE_HEIGHT = 0.4
_LEGEND_HEIGHT = 0.35
_SCALE_GAP, _SCALE_WIDTH, _SCALE_LABELS = 0.2, 0.13, 0.75


@dataclass(frozen=True, slots=True)
class CellGeometry:
    """Size of a cell, and of the text in it and along its edges.

    Attributes:
        width: Of one cell, in inches.
        height: Of one cell, in inches.
        columns: The column labels as written: broken at their dots, or upright on one line.
        upright: Whether they stand upright, being too wide for their columns.
        column_points: Font size of the column labels.
        row_points: Font size of the row labels.
        number_points: Font size at which three digits fit into a cell.
    """

    width: float
    height: float
    columns: tuple[str, ...]
    upright: bool
    column_points: float
    row_points: float
    number_points: float


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Sizes and places of a heatmap's parts.

    Attributes:
        width: Of the page, in inches.
        height: Of the page, in inches.
        grid: Left, bottom, width and height of the cells' area, as fractions of the page.
        scale: Left, bottom, width and height of the colour scale, as fractions of the page.
        left: Left edge of the title and the legend, as a fraction of the page.
        title: Top of the title, as a fraction of the page.
        legend: Bottom of the legend, as a fraction of the page.
    """

    width: float
    height: float
    grid: tuple[float, float, float, float]
    scale: tuple[float, float, float, float]
    left: float
    title: float
    legend: float


def row_positions(layout: GridLayout) -> list[float]:
    """Return the upper edge of each row, in cells from the top, with a gap between groups.

    >>> from rankflow.report.layout import lay_out
    >>> row_positions(lay_out(["layers.0.q", "layers.1.q", "head"]))
    [0.0, 1.0, 2.35]
    """
    return [row + GROUP_GAP * group for row, group in enumerate(layout.groups)]


def measure_cells(layout: GridLayout) -> CellGeometry:
    """Return how large the cells of the layout's heatmap are, and their text."""
    broken = tuple(label.replace(".", "\n") for label in layout.columns)
    longest = max(len(line) for label in broken for line in label.split("\n"))
    widest = _text_width(longest, LABEL_POINTS)
    width = _fit(9.0 / len(broken), 0.11, _fit(widest + 0.08, 0.6, 0.95))
    height = _fit(12.0 / len(layout.rows), 0.15, 0.28)
    upright = widest > width
    row_points = _font_size(height)
    return CellGeometry(
        width=width,
        height=height,
        columns=layout.columns if upright else broken,
        upright=upright,
        column_points=_font_size(width) if upright else LABEL_POINTS,
        row_points=row_points,
        number_points=min(row_points, (width - 0.04) * POINTS / (3 * _CHARACTER)),
    )


def measure_page(layout: GridLayout, cells: CellGeometry, title: str) -> PageGeometry:
    """Return where the parts of the layout's heatmap stand."""
    grid_width = cells.width * len(cells.columns)
    grid_height = cells.height * (row_positions(layout)[-1] + 1)
    scale_height = _fit(grid_height, 0.9, 1.8)

    left = _EDGE + _text_width(max(map(len, layout.rows)), cells.row_points) + 0.1
    right = left + grid_width + _SCALE_GAP
    bottom = _EDGE + _LEGEND_HEIGHT + max(scale_height - grid_height, 0.0)
    top = bottom + grid_height
    title_top = top + _labels_height(cells) + _TITLE_HEIGHT
    title_width = _text_width(len(title), 1.15 * TITLE_POINTS)  # bold is wider

    width = max(right + _SCALE_WIDTH + _SCALE_LABELS, title_width + 2 * _EDGE)
    height = title_top + _EDGE
    scale_bottom = top - scale_height
    return PageGeometry(
        width=width,
        height=height,
        grid=(left / width, bottom / height, grid_width / width, grid_height / height),
        scale=(right / width, scale_bottom / height, _SCALE_WIDTH / width, scale_height / height),
        left=_EDGE / width,
        title=title_top / height,
        legend=_EDGE / height,
    )


def _fit(size: float, smallest: float, largest: float) -> float:
    return min(max(size, smallest), largest)


def _font_size(room: float) -> float:
    """Return the size of a line of text that fits into ``room`` inches, in points."""
    return _fit(0.68 * room * POINTS, 4.0, LABEL_POINTS)


def _labels_height(cells: CellGeometry) -> float:
    if cells.upright:
        return _text_width(max(map(len, cells.columns)), cells.column_points)
    lines = max(label.count("\n") + 1 for label in cells.columns)
    return lines * _LINE * cells.column_points / POINTS


def _text_width(characters: int, points: float) -> float:
    return characters * _CHARACTER * points / POINTS
