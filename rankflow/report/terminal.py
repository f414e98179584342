"""The heatmap of ranks for a terminal.

Every cell shows its rank in digits, so that nothing is lost without colour: ``0`` is a site with
no component left, ``·`` a place without a site, and a dot behind a rank, as in ``3•``, a DoRA
magnitude that is trained. A grid wider than the terminal is cut into bands
of columns, one below the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.style import Style
from rich.text import Text

from rankflow.report.layout import GridLayout, lay_out
from rankflow.report.palette import hex_of, ink_on, rank_shade

ABSENT = "·"
LONGEST_LABEL = 24
NARROWEST_COLUMN = 3

_GAP = " "
_MAGNITUDE = {True: "•", False: " "}
_HEADING = Style(bold=True)
_FAINT = Style(dim=True)


def rank_table(
    ranks: Mapping[str, int],
    *,
    costs: Mapping[str, int] | None = None,
    magnitudes: Mapping[str, bool] | None = None,
    width: int = 80,
) -> Text:
    """Return the ranks as text to print with rich: a line for each layer, a column for each type.

    Args:
        ranks: Rank of each site, by site name; at least one site.
        costs: Trainable parameters of each site, by site name; if given, each line ends with the
            sum over its sites.
        magnitudes: Whether each site trains a magnitude, by site name; None or empty marks none.
        width: Characters of a line, e.g. ``console.width``. A single column may be wider.

    >>> ranks = {"layers.0.q": 4, "layers.0.v": 0, "layers.1.q": 12, "head": 2}
    >>> print(rank_table(ranks).plain)  # doctest: +NORMALIZE_WHITESPACE
          q   v
       0  4   0
       1 12   ·
    <BLANKLINE>
    head    2
    >>> has = {"h.0.q": False, "h.0.v": True}
    >>> table = rank_table({"h.0.q": 4, "h.0.v": 0}, magnitudes=has)
    >>> print(table.plain)  # doctest: +NORMALIZE_WHITESPACE
       q   v
    0  4   0•
    """
    layout = lay_out(ranks)
    labels = _align([_shorten(label) for label in layout.rows])
    sums = _align(["parameters", *_sum_rows(layout, costs)]) if costs else [""] * (len(labels) + 1)
    grid = RankGrid(layout, dict(ranks), max(ranks.values()), dict(magnitudes or {}))
    bands = _split_columns(grid.widths, width - len(labels[0]) - len(sums[0]) - 2 * len(_GAP))
    return Text("\n\n").join(_draw_band(grid, columns, labels, sums) for columns in bands)


@dataclass(frozen=True, slots=True)
class RankGrid:
    """The ranks in their places.

    Attributes:
        layout: Place of each site.
        ranks: Rank of each site, by site name.
        maximum: Rank at the top of the colour scale.
        magnitudes: Whether each site trains a magnitude, by site name; empty marks none.
    """

    layout: GridLayout
    ranks: dict[str, int]
    maximum: int
    magnitudes: dict[str, bool]

    @property
    def digits(self) -> int:
        """Width of a number, in characters."""
        return len(str(self.maximum))

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each column, in characters."""
        narrowest = max(NARROWEST_COLUMN, self.digits + bool(self.magnitudes))
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
        background = rank_shade(self.ranks[site], self.maximum)
        style = Style(color=hex_of(ink_on(background)), bgcolor=hex_of(background))
        mark = _MAGNITUDE[self.magnitudes[site]] if self.magnitudes else ""
        return Text(f"{self.ranks[site]:>{self.digits}}{mark}".center(width), style)


def _draw_band(grid: RankGrid, columns: range, labels: Sequence[str], sums: Sequence[str]) -> Text:
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


def _sum_rows(layout: GridLayout, costs: Mapping[str, int]) -> list[str]:
    sums = [0] * len(layout.rows)
    for site, cell in layout.cells.items():
        sums[cell.row] += costs[site]
    return [f"{total:,}" for total in sums]


def _align(texts: Sequence[str]) -> list[str]:
    width = max(map(len, texts))
    return [text.rjust(width) for text in texts]


def _shorten(label: str) -> str:
    return label if len(label) <= LONGEST_LABEL else "…" + label[1 - LONGEST_LABEL :]
