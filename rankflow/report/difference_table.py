"""The difference of two allocations for a terminal: heatmap, totals, and sites of one only."""

from collections.abc import Mapping

from rich.table import Table
from rich.text import Text

from rankflow.report.difference import Allocation, Difference, signed
from rankflow.report.layout import lay_out
from rankflow.report.palette import difference_shade
from rankflow.report.text_grid import TextCell, TextGrid, draw_text_grid

GAINED, LOST = "•", "◦"


def difference_table(difference: Difference, *, width: int = 80) -> Text:
    """Return the differences of the ranks as text to print with rich.

    ``+2`` is two components more in B than in A, a dot behind it a magnitude that only B has
    (``•``) or only A (``◦``). A site that only one has shows the letter of that one.

    Args:
        difference: Of A and B; at least one site.
        width: Characters of a line, e.g. ``console.width``. A single column may be wider.

    >>> found = Difference({"h.0.q": 2, "h.0.v": 0}, {"h.1.q": 4}, {}, frozenset(["h.0.q"]), set())
    >>> print(difference_table(found).plain)  # doctest: +NORMALIZE_WHITESPACE
         q   v
    0  +2•   0
    1   A    ·
    """
    marked = bool(difference.gained or difference.lost)
    cells = {
        site: TextCell(
            signed(change),
            _mark(difference, site) if marked else "",
            difference_shade(change, difference.largest),
        )
        for site, change in difference.ranks.items()
    }
    for letter, sites in (("A", difference.only_a), ("B", difference.only_b)):
        cells |= {site: TextCell(letter, " " if marked else "", None) for site in sites}
    return draw_text_grid(TextGrid(lay_out(difference.sites), cells), width=width)


def totals_table(a: Allocation, b: Allocation) -> Table:
    """Return the totals of two allocations, and how they differ, as a table to print with rich."""
    table = Table(box=None, pad_edge=False)
    for heading in ("", "A", "B", "B - A"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, before, after in (
        ("sites", len(a.ranks), len(b.ranks)),
        ("components", sum(a.ranks.values()), sum(b.ranks.values())),
        ("magnitudes", len(a.magnitudes), len(b.magnitudes)),
        ("parameters", a.parameters, b.parameters),
    ):
        table.add_row(label, f"{before:,}", f"{after:,}", f"{after - before:+,}")
    return table


def tell_unshared(difference: Difference) -> list[str]:
    """Name the sites that only one of the two has, with their ranks.

    >>> tell_unshared(Difference({}, {"head": 3}, {}, set(), set()))
    ['only in A: head (rank 3)']
    """
    return [
        f"only in {letter}: {_list(ranks)}"
        for letter, ranks in (("A", difference.only_a), ("B", difference.only_b))
        if ranks
    ]


def _list(ranks: Mapping[str, int]) -> str:
    return ", ".join(f"{site} (rank {rank})" for site, rank in ranks.items())


def _mark(difference: Difference, site: str) -> str:
    if site in difference.gained:
        return GAINED
    return LOST if site in difference.lost else " "
