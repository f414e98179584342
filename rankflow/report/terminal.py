"""The heatmap of ranks for a terminal.

``0`` is a site with no component left, and a dot behind a rank, as in ``3•``, a DoRA magnitude
that is trained.
"""

from collections.abc import Mapping

from rich.text import Text

from rankflow.report.layout import GridLayout, lay_out
from rankflow.report.palette import rank_shade
from rankflow.report.text_grid import TextCell, TextGrid, draw_text_grid

_MAGNITUDE = {True: "•", False: " "}


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
    maximum = max(ranks.values())
    cells = {
        site: TextCell(
            str(rank),
            _MAGNITUDE[magnitudes[site]] if magnitudes else "",
            rank_shade(rank, maximum),
        )
        for site, rank in ranks.items()
    }
    sums = ["parameters", *_sum_rows(layout, costs)] if costs else []
    return draw_text_grid(TextGrid(layout, cells), width=width, sums=sums)


def _sum_rows(layout: GridLayout, costs: Mapping[str, int]) -> list[str]:
    sums = [0] * len(layout.rows)
    for site, cell in layout.cells.items():
        sums[cell.row] += costs[site]
    return [f"{total:,}" for total in sums]
