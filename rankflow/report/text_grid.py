"""A heatmap for a terminal: a line for each layer, a column for each type of module.

Every cell shows its number in digits, so that nothing is lost without colour; ``·`` is a place
without a site. A grid wider than the terminal is cut into bands of columns, one below the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from rankflow.report.layout import GridLayout
from rankflow.report.palette import RGB, hex_of, ink_on

ABSENT = "·"
LONGEST_LABEL = 24
NARROWEST_COLUMN = 3

_GAP = " "
_HEADING = Style(bold=True)
_FAINT = Style(dim=True)


@dataclass(frozen=True, slots=True)
class TextCell:
    """What a site's cell shows.

    Attributes:
        number: Its number, as written.
        mark: What stands behind the number; of one width in all cells.
        colour: Its background; None leaves it plain.
    """

    number: str
    mark: str
    colour: RGB | None


@dataclass(frozen=True, slots=True)
class TextGrid:
    """Cells in their places.

    Attributes:
        layout: Place of each site.
        cells: What each site's cell shows, by site name.
    """

    layout: GridLayout
    cells: Mapping[str, TextCell]

    @property
    def digits(self) -> int:
        """Width of a number, in characters."""
        return max(len(cell.number) for cell in self.cells.values())

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each column, in characters."""
        mark = max(len(cell.mark) for cell in self.cells.values())
        narrowest = max(NARROWEST_COLUMN, self.digits + mark)
        return tuple(max(narrowest, *map(len, c.split("."))) for c in self.layout.columns)

    def header(self, columns: range) -> list[Text]:
        """Return the lines of the columns' labels, broken at their dots, set at the bottom."""
        labels = [self.layout.columns[column].split(".") for column in columns]
        height = max(map(len, labels))
        padded = [[""] * (height - len(label)) + label for label in labels]
        widths = [self.widths[column] for column in columns]
        return [
            Text(_GAP.join(f"{part:^{w}}" for part, w in zip(parts, widths, strict=True)), _HEADING)
            for parts in zip(*padded, strict=True)
        ]

    def lines(self, columns: range) -> list[Text]:
        """Return the cells of each row; a site without a layer fills its row."""
        site_at = {(cell.row, cell.column): site for site, cell in self.layout.cells.items()}
        whole = sum(self.widths[column] for column in columns) + len(_GAP) * (len(columns) - 1)
        lines = []
        for row in range(len(self.layout.rows)):
            first = site_at.get((row, 0))
            if first is not None and self.layout.cells[first].span > 1:
                lines.append(self._cell(first, whole))
            else:
                cells = [self._cell(site_at.get((row, c)), self.widths[c]) for c in columns]
                lines.append(Text(_GAP).join(cells))
        return lines

    def _cell(self, site: str | None, width: int) -> Text:
        if site is None:
            return Text(f"{ABSENT:>{self.digits}}".center(width), _FAINT)
        cell = self.cells[site]
        text = f"{cell.number:>{self.digits}}{cell.mark}".center(width)
        if cell.colour is None:
            return Text(text, _FAINT)
        style = Style(color=hex_of(ink_on(cell.colour)), bgcolor=hex_of(cell.colour))
        return Text(text, style)


def draw_text_grid(grid: TextGrid, *, width: int, sums: Sequence[str] = ()) -> Text:
    """Return the grid as text to print with rich.

    Args:
        grid: The cells.
        width: Characters of a line; a single column may be wider.
        sums: What stands at the end of the header and of each row, if anything does.
    """
    labels = _align([_shorten(label) for label in grid.layout.rows])
    tails = _align(sums) if sums else [""] * (len(labels) + 1)
    bands = _split_columns(grid.widths, width - len(labels[0]) - len(tails[0]) - 2 * len(_GAP))
    return Text("\n\n").join(_draw_band(grid, columns, labels, tails) for columns in bands)


def _draw_band(grid: TextGrid, columns: range, labels: Sequence[str], sums: Sequence[str]) -> Text:
    header = grid.header(columns)
    margin = [" " * len(labels[0])] * len(header) + list(labels)
    tails = [""] * (len(header) - 1) + list(sums)
    groups = [0] * len(header) + list(grid.layout.groups)
    parts = zip(margin, header + grid.lines(columns), tails, strict=True)
    lines = [Text(_GAP).join([Text(label), cells, Text(tail)]) for label, cells, tail in parts]
    spaced: list[Text] = []
    for line, group, previous in zip(lines, groups, [0, *groups[:-1]], strict=True):
        spaced += [line] if group == previous else [Text(), line]
    return Text("\n").join(spaced)


def _split_columns(widths: Sequence[int], room: int) -> list[range]:
    """Cut the columns into bands no wider than the room, with at least one column each.

    >>> _split_columns([5, 5, 5], room=11)
    [range(0, 2), range(2, 3)]
    """
    starts, used = [0], 0
    for column, width in enumerate(widths):
        if used and used + len(_GAP) + width > room:
            starts.append(column)
            used = 0
        used += width + (len(_GAP) if used else 0)
    ends = [*starts[1:], len(widths)]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


def _align(texts: Sequence[str]) -> list[str]:
    width = max(map(len, texts))
    return [text.rjust(width) for text in texts]


def _shorten(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else "…" + label[1 - LONGEST_LABEL :]
