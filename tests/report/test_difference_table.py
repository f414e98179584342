from io import StringIO

from rich.console import Console

from rankflow.report.difference import Allocation, Difference
from rankflow.report.difference_table import difference_table, tell_unshared, totals_table
from rankflow.report.palette import DIVERGING, hex_of

FOUND = Difference(
    ranks={"h.0.q": 2, "h.0.v": -12, "h.1.q": 0},
    only_a={"h.1.v": 7},
    only_b={"head": 3},
    gained=frozenset({"h.0.v"}),
    lost=frozenset({"h.1.q"}),
)


def test_every_site_stands_in_its_place_with_its_sign():
    lines = [line.split() for line in difference_table(FOUND).plain.splitlines()]
    assert lines == [["q", "v"], ["0", "+2", "-12•"], ["1", "0◦", "A"], [], ["head", "B"]]


def test_the_lines_are_as_long_as_each_other():
    lengths = {len(line) for line in difference_table(FOUND).plain.splitlines() if line}
    assert len(lengths) == 1


def test_less_and_more_have_the_two_ends_of_the_colours():
    table = difference_table(FOUND)
    colours = {
        table.plain[span.start : span.end].strip(): span.style.bgcolor.name
        for span in table.spans
        if span.style.bgcolor
    }
    assert colours["-12•"] == hex_of(DIVERGING[0])
    assert colours["0◦"] == hex_of(DIVERGING[4])
    assert colours.keys() == {"+2", "-12•", "0◦"}


def test_totals_are_told_of_both_with_their_difference():
    a = Allocation({"q": 4, "v": 2000}, frozenset({"q"}), 165_888)
    b = Allocation({"q": 5}, frozenset(), 170_000)
    console = Console(file=StringIO(), width=80)
    console.print(totals_table(a, b))
    assert [line.split() for line in console.file.getvalue().splitlines()] == [
        ["A", "B", "B", "-", "A"],
        ["sites", "2", "1", "-1"],
        ["components", "2,004", "5", "-1,999"],
        ["magnitudes", "1", "0", "-1"],
        ["parameters", "165,888", "170,000", "+4,112"],
    ]


def test_sites_of_one_only_are_named_with_their_ranks():
    assert tell_unshared(FOUND) == ["only in A: h.1.v (rank 7)", "only in B: head (rank 3)"]
