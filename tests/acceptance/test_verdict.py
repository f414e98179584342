"""What becomes of a row, by what stock PEFT makes of it and what RankFlow did to its adapters."""

import importlib
from pathlib import Path

import pytest

NAME = "peft_tests/test_ours.py::test_it[0.5-LoRA]"


@pytest.fixture
def modules(monkeypatch):
    """Import a module of the script as the script does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module


@pytest.fixture
def row(modules):
    """Make a row with an adapter that had ranks 4 and 4, unless it has none."""

    def row(outcome, *ranks, name=NAME, error="", **magnitudes):
        steered = modules("steering").Steered
        after = dict(zip("ab", ranks, strict=False))
        adapter = steered({"a": 4, "b": 4}, after, pruned=1, magnitudes=magnitudes)
        return modules("rows").Row(name, outcome, error, (adapter,) if ranks else ())

    return row


@pytest.fixture
def exclusion(modules):
    return modules("exclusions").Exclusion("test_ours.py", r"\[.*LoRA", "why", scenes=("uneven",))


@pytest.fixture
def fate(modules, row):
    """The one list of the verdict that a row is in."""

    def fate(steered, scene="uneven", exclusions=(), stock="passed"):
        rows = [] if steered is None else [steered]
        verdict = modules("verdict").judge([row(stock)], rows, scene, exclusions)
        lists = ("passed", "failed", "unshown", "untouched", "excluded", "needless")
        return [name for name in lists if getattr(verdict, name)]

    return fate


def test_a_row_passes_where_the_scene_came_about(row, fate):
    assert fate(row("passed", 3, 1)) == ["passed"]
    assert fate(row("passed", 3, 0), "dead") == ["passed"]
    assert fate(row("passed", 3, 1, a=True, b=False), "magnitude-off") == ["passed"]


def test_a_row_whose_adapter_does_not_show_the_scene_is_no_pass(row, fate):
    assert fate(row("passed", 4, 4)) == ["unshown"]
    assert fate(row("passed", 3, 1), "dead") == ["unshown"]
    assert fate(row("passed", 3, 1, a=True), "magnitude-off") == ["unshown"]
    assert fate(row("passed")) == ["untouched"]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_a_row_that_does_not_pass_as_under_stock_peft_fails(row, fate, outcome):
    assert fate(row(outcome, 3, 1)) == ["failed"]
    assert fate(row(outcome)) == ["failed"]


def test_a_row_that_did_not_run_fails(fate):
    assert fate(None) == ["failed"]


@pytest.mark.parametrize("outcome", ["failed", "skipped"])
def test_a_row_that_stock_peft_does_not_pass_says_nothing(row, fate, outcome):
    assert fate(row("failed", 3, 1), stock=outcome) == []


def test_an_exclusion_lets_its_rows_fail_in_its_scenes(row, fate, exclusion):
    assert fate(row("failed", 3, 1), exclusions=[exclusion]) == ["excluded"]
    assert fate(row("failed", 3, 0), "dead", [exclusion]) == ["failed"]


def test_an_excluded_row_that_fails_by_another_error_than_expected_fails(modules, row, fate):
    exclusion = modules("exclusions").Exclusion("test_ours.py", "LoRA", "why", error="SiteError")
    assert fate(row("failed", error="a SiteError: refused"), exclusions=[exclusion]) == ["excluded"]
    assert fate(row("failed", error="a KeyError"), exclusions=[exclusion]) == ["failed"]


def test_an_exclusion_of_a_row_that_passes_is_needless(row, fate, exclusion):
    assert fate(row("passed", 3, 1), exclusions=[exclusion]) == ["needless"]


@pytest.mark.parametrize(
    "name", ["test_ours.py::test_it[LoHa]", "test_theirs.py::test_it[LoRA]", "test_ours.py::LoRA"]
)
def test_an_exclusion_speaks_of_its_file_and_pattern_alone(exclusion, name):
    assert exclusion.covers(NAME, "uneven")
    assert not exclusion.covers(name, "uneven")


def test_an_exclusion_that_no_row_needs_is_stale(modules, row, exclusion):
    verdict = modules("verdict")
    needed = verdict.judge([row("passed")], [row("failed")], "uneven", [exclusion])
    needless = verdict.judge([row("passed")], [row("passed", 3, 1)], "uneven", [exclusion])
    assert verdict.find_stale([needed, needless], [exclusion]) == []
    assert verdict.find_stale([needless], [exclusion]) == [exclusion]
