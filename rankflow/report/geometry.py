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
LEGEND_POINTS = 8.0

_CHARACTER = 0.6  # mean width of a character of DejaVu Sans over its size
_LINE = 1.25  # height of a line of text over its size
_EDGE = 0.15
_TITLE_HEIGHT = 0.4
_LEGEND_HEIGHT = 0.35
_SCALE_GAP, _SCALE_WIDTH, _SCALE_HEIGHT, _SCALE_LABELS = 0.2, 0.13, 1.8, 0.75


@dataclass(frozen=True, slots=True)
class PageGeometry:
    """Sizes and places of a heatmap's parts.

    Attributes:
        width: Of the page, in inches.
        height: Of the page, in inches.
        cell_width: Of one cell, in inches.
        cell_height: Of one cell, in inches.
        grid: Left, bottom, width and height of the cells' area, as fractions of the page.
        scale: Left, bottom, width and height of the colour scale, as fractions of the page.
        left: Left edge of the title and the legend, as a fraction of the page.
        title: Top of the title, as a fraction of the page.
        legend: Bottom of the legend, as a fraction of the page.
        columns: The column labels as written: broken at their dots, or upright on one line.
        upright: Whether they stand upright, being too wide for their columns.
        row_points: Font size of the row labels.
        column_points: Font size of the column labels.
        number_points: Largest font size at which three digits fit into a cell.
    """

    width: float
    height: float
    cell_width: float
    cell_height: float
    grid: tuple[float, float, float, float]
    scale: tuple[float, float, float, float]
    left: float
    title: float
    legend: float
    columns: tuple[str, ...]
    upright: bool
    row_points: float
    column_points: float
    number_points: float


def row_positions(layout: GridLayout) -> list[float]:
    """Return the upper edge of each row, in cells from the top, with a gap between groups.

    >>> from rankflow.report.layout import lay_out
    >>> row_positions(lay_out(["layers.0.q", "layers.1.q", "head"]))
    [0.0, 1.0, 2.35]
    """
    return [row + GROUP_GAP * group for row, group in enumerate(layout.groups)]


def measure_page(layout: GridLayout, title: str) -> PageGeometry:
    """Return where the parts of the layout's heatmap stand."""
    broken = tuple(label.replace(".", "\n") for label in layout.columns)
    widest = _text_width(max(len(line) for label in broken for line in label.split("\n")), 8.0)
    cell_width = _fit(9.0 / len(broken), 0.11, _fit(widest + 0.08, 0.6, 0.95))
    cell_height = _fit(12.0 / len(layout.rows), 0.15, 0.28)
    upright = widest > cell_width
    columns = layout.columns if upright else broken
    row_points = _font_size(cell_height)
    column_points = _font_size(cell_width) if upright else 8.0

    rows = row_positions(layout)[-1] + 1
    grid_width, grid_height = cell_width * len(columns), cell_height * rows
    labels_width = _text_width(max(map(len, layout.rows)), row_points) + 0.1
    labels_height = _labels_height(columns, column_points, upright)
    scale_height = min(max(grid_height, 0.9), _SCALE_HEIGHT)

    left = _EDGE + labels_width
    bottom = _EDGE + _LEGEND_HEIGHT + max(scale_height - grid_height, 0.0)
    right = left + grid_width + _SCALE_GAP
    top = bottom + grid_height
    title_top = top + labels_height + _TITLE_HEIGHT
    width = max(
        right + _SCALE_WIDTH + _SCALE_LABELS,
        2 * _EDGE + _text_width(len(title), 1.15 * TITLE_POINTS),
    )
    height = title_top + _EDGE
    return PageGeometry(
        width=width,
        height=height,
        cell_width=cell_width,
        cell_height=cell_height,
        grid=(left / width, bottom / height, grid_width / width, grid_height / height),
        scale=(
            right / width,
            (top - scale_height) / height,
            _SCALE_WIDTH / width,
            scale_height / height,
        ),
        left=_EDGE / width,
        title=title_top / height,
        legend=_EDGE / height,
        columns=columns,
        upright=upright,
        row_points=row_points,
        column_points=column_points,
        number_points=(cell_width - 0.04) * POINTS / (3 * _CHARACTER),
    )


def _fit(size: float, smallest: float, largest: float) -> float:
    return min(max(size, smallest), largest)


def _font_size(room: float) -> float:
    """Return the size of a line of text that fits into ``room`` inches, in points."""
    return _fit(0.68 * room * POINTS, 4.0, 8.0)


def _labels_height(columns: tuple[str, ...], points: float, upright: bool) -> float:
    if upright:
        return _text_width(max(map(len, columns)), points)
    return max(label.count("\n") + 1 for label in columns) * _LINE * points / POINTS


def _text_width(characters: int, points: float) -> float:
    return characters * _CHARACTER * points / POINTS
