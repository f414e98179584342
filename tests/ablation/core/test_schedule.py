import math
import random
from dataclasses import replace

import pytest

from rankflow.ablation.records import Cell, Place
from rankflow.ablation.schedule import (
    Trial,
    chosen_point,
    obstacle,
    places_of,
    ready_cells,
    source_cell,
)
from rankflow.ablation.tuning import Point

TRIALS = {
    "lora": Trial(0.02),
    "hybrid": Trial(0.04),
    "frozen-pattern": Trial(0.02, follows="hybrid"),
}
HYBRID = Place("planted", "rank 2", "hybrid")
FROZEN = Place("planted", "rank 2", "frozen-pattern")


@pytest.fixture
def spec(planted):
    return planted("seeds=3", "tuning={ rates = [0.02, 0.04], seeds = [100, 101], widest = 8 }")


def loss_of(cell):
    """A loss whose best rate depends on the method, and whose value depends on everything."""
    best = {"lora": 0.005, "hybrid": 0.08}.get(cell.method, 0.02)
    return 1 + math.log2(cell.rate / best) ** 2 + 0.01 * (cell.seed % 7)


def drive(spec, trials, order, make):
    """Run cells, one of the ready ones at a time, until none is ready."""
    results = {}
    for _ in range(1000):
        ready = [c for p in places_of(spec) for c in ready_cells(spec, trials, results, p)]
        if not ready:
            return results
        assert len(set(ready)) == len(ready)
        assert not set(ready) & set(results)
        cell = ready[order.randrange(len(ready))]
        source = source_cell(spec, trials, results, cell)
        if trials[cell.method].follows is not None:
            assert source is not None
            assert (source.seed, source.split) == (cell.seed, cell.split)
        results[cell] = make(cell)
    raise AssertionError("the schedule does not end")


def test_the_same_cells_run_in_whatever_order_they_end(spec, result_of):
    def make(cell):
        return result_of(cell, metrics={"excess": loss_of(cell)})

    ran = [drive(spec, TRIALS, random.Random(seed), make) for seed in range(6)]
    assert all(set(results) == set(ran[0]) for results in ran)
    points = {p.method: chosen_point(spec, TRIALS, ran[0], p) for p in places_of(spec)}
    assert points == {
        "lora": Point(0.005),
        "hybrid": Point(0.08),
        "frozen-pattern": Point(0.02),
    }
    tests = {(c.method, c.rate, c.seed) for c in ran[0] if c.split == "test"}
    assert tests == {(m, p.rate, seed) for m, p in points.items() for seed in range(3)}
    assert all(not obstacle(spec, TRIALS, ran[0], place) for place in places_of(spec))


@pytest.mark.parametrize("status", ["failed", "unsupported"])
def test_a_method_that_fails_or_cannot_run_keeps_no_other_from_running(spec, result_of, status):
    def make(cell):
        broken = cell.method == "lora"
        return result_of(
            cell, status=status if broken else "done", metrics={"excess": loss_of(cell)}
        )

    results = drive(spec, TRIALS, random.Random(0), make)
    finished = {c.method for c, r in results.items() if c.split == "test" and r.status == "done"}
    assert finished == {"hybrid", "frozen-pattern"}
    assert not any(c.method == "lora" and c.split == "test" for c in results)
    assert not obstacle(spec, TRIALS, results, Place("planted", "rank 2", "lora"))


def test_a_test_cell_that_fails_leaves_the_other_seeds_and_blocks_its_own_follower(spec, result_of):
    def make(cell):
        broken = cell.method == "hybrid" and cell.split == "test" and cell.seed == 1
        return result_of(
            cell, status="failed" if broken else "done", metrics={"excess": loss_of(cell)}
        )

    results = drive(spec, TRIALS, random.Random(0), make)
    seeds = {
        m: sorted(c.seed for c in results if c.method == m and c.split == "test") for m in TRIALS
    }
    assert seeds == {"lora": [0, 1, 2], "hybrid": [0, 1, 2], "frozen-pattern": [0, 2]}
    assert obstacle(spec, TRIALS, results, FROZEN) == (
        "it retrains the ranks of 'hybrid', of which no run with seed 1 has finished"
    )


def test_a_follower_of_a_method_that_cannot_run_says_what_it_waits_for(spec, result_of):
    def make(cell):
        broken = cell.method == "hybrid"
        return result_of(
            cell, status="unsupported" if broken else "done", metrics={"excess": loss_of(cell)}
        )

    results = drive(spec, TRIALS, random.Random(0), make)
    assert not any(c.method == "frozen-pattern" for c in results)
    assert "no run with seed 100, 101 has finished" in obstacle(spec, TRIALS, results, FROZEN)


def test_a_follower_waits_for_the_run_of_its_own_seed(spec, result_of):
    assert ready_cells(spec, TRIALS, {}, FROZEN) == []
    done = {}
    while not any(c.split == "test" for c in ready_cells(spec, TRIALS, done, HYBRID)):
        for cell in ready_cells(spec, TRIALS, done, HYBRID):
            done[cell] = result_of(cell, metrics={"excess": loss_of(cell)})
    seeds = {cell.seed for cell in ready_cells(spec, TRIALS, done, FROZEN)}
    assert seeds == {100, 101}
    one = Cell("planted", "rank 2", "frozen-pattern", "test", 1, 0.02)
    assert source_cell(spec, TRIALS, done, one) is None
    source = replace(one, method="hybrid", rate=0.08)
    done[source] = result_of(source)
    assert source_cell(spec, TRIALS, done, one) == source


def test_a_method_that_diverges_at_every_rate_is_not_tested_and_says_so(spec, result_of):
    def make(cell):
        loss = math.nan if cell.method == "lora" else loss_of(cell)
        return result_of(cell, metrics={"excess": loss})

    results = drive(spec, TRIALS, random.Random(0), make)
    place = Place("planted", "rank 2", "lora")
    assert chosen_point(spec, TRIALS, results, place) is None
    assert obstacle(spec, TRIALS, results, place) == (
        "it diverged at every learning rate that was tried"
    )
    rates = sorted({c.rate for c in results if c.method == "lora"})
    assert rates == [0.0025, 0.005, 0.01, 0.02, 0.04]


def test_a_rate_counts_once_all_its_tuning_seeds_have_run(spec, result_of):
    cells = ready_cells(spec, TRIALS, {}, HYBRID)
    assert {(c.rate, c.seed) for c in cells} == {(r, s) for r in (0.02, 0.04) for s in (100, 101)}
    results = {cell: result_of(cell) for cell in cells[:-1]}
    assert ready_cells(spec, TRIALS, results, HYBRID) == cells[-1:]


def test_accuracy_is_tuned_upwards(texts, result_of):
    spec = texts("judge=accuracy", "tuning={ enabled = true, rates = [0.1, 0.2], widest = 1 }")
    place = Place("encoder", "rank 2", "lora")
    cells = ready_cells(spec, {"lora": Trial(0.1)}, {}, place)
    results = {c: result_of(c, metrics={"accuracy": c.rate}) for c in cells}
    assert chosen_point(spec, {"lora": Trial(0.1)}, results, place) == Point(0.2)


def test_scalings_are_tuned_only_where_the_spec_lets_them(planted, result_of):
    trials = {**TRIALS, "lora": Trial(0.02, (1.0, 4.0))}
    place = Place("planted", "rank 2", "lora")
    for enabled, expected in (("true", {1.0, 4.0}), ("false", {1.0})):
        spec = planted(f"tuning.scalings={enabled}")
        results = drive(
            spec, trials, random.Random(0), lambda c: result_of(c, metrics={"excess": loss_of(c)})
        )
        found = {c.scaling for c in results if c.method == "lora" and c.split == "validation"}
        assert found == expected, place


def test_without_tuning_every_method_runs_at_its_first_rate(planted):
    spec = planted("tuning.enabled=false", "seeds=[4, 7]")
    cells = ready_cells(spec, TRIALS, {}, HYBRID)
    assert [(c.split, c.seed, c.rate) for c in cells] == [("test", 4, 0.04), ("test", 7, 0.04)]
