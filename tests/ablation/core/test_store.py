import json
import math
import os
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from rankflow.ablation.records import (
    Cell,
    Forgetting,
    Latency,
    Parameters,
    RankHistory,
    RankMoment,
)
from rankflow.ablation.store import Store, cell_path, render
from rankflow.errors import RankFlowError

CELL = Cell("planted", "rank 2", "hybrid", "test", 3, 0.1, 0.5)
FULL = {
    "metrics": {"nll": 0.1 + 0.2, "accuracy": math.nan, "perplexity": math.inf},
    "parameters": Parameters(100, 98, 150, 98, 34, 7),
    "seconds_per_step": 1e-9,
    "cpu_seconds_per_step": None,
    "peak_bytes": 2**40,
    "latency": Latency(0.1, 0.2, None),
    "forgetting": Forgetting("similarity", 0.8, -math.inf),
    "ranks": RankHistory(("a.b", "c"), (RankMoment(0, 9, (1, 2)), RankMoment(4, 8, (0, 3), (1,)))),
}


@pytest.fixture(params=["folder", "memory"])
def store(request, tmp_path):
    """A store in a folder, and one in another of fsspec's file systems."""
    yield Store(
        str(tmp_path / "a folder [1]") if request.param == "folder" else "memory://ablations"
    )
    fsspec.filesystem("memory").store.clear()


def only(store):
    (result,) = store.load().values()
    return result


def test_a_result_comes_back_as_it_was_with_numbers_that_are_none(store, result_of):
    result = result_of(CELL, **FULL)
    store.save(result)
    found = only(store)
    assert repr(found) == repr(result)  # NaN equals nothing, not even itself
    assert math.isnan(found.metrics["accuracy"])
    assert found.forgetting.after == -math.inf
    store.archive([result])
    assert repr(only(store)) == repr(result)


def test_an_empty_store_has_no_results(store):
    assert store.load() == {}


def test_results_are_json_that_other_programs_read(store, result_of):
    text = render(result_of(CELL, **FULL))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert json.loads(text, parse_constant=refuse)["metrics"]["accuracy"] == "nan"


def test_cells_win_over_the_archive_and_both_are_merged(store, result_of):
    one, two = (result_of(replace(CELL, seed=seed), digest=f"{seed}" * 12) for seed in (1, 2))
    store.archive([one, two])
    newer = replace(one, metrics={"excess": 0.25})
    store.save(newer)
    assert store.load() == {"1" * 12: newer, "2" * 12: two}


def test_the_archive_does_not_depend_on_the_order_of_results(tmp_path, result_of):
    results = [result_of(replace(CELL, seed=seed), digest=f"{seed}" * 12) for seed in (2, 1, 3)]
    for name, order in (("a", results), ("b", results[::-1])):
        Store(str(tmp_path / name)).archive(order)
    assert (tmp_path / "a/results.jsonl").read_text() == (tmp_path / "b/results.jsonl").read_text()


def test_a_damaged_result_is_named_with_the_way_out(tmp_path, result_of):
    store = Store(str(tmp_path))
    store.save(result_of(CELL))
    (path,) = tmp_path.rglob("result.json")
    path.write_text(path.read_text()[:-40])
    with pytest.raises(RankFlowError, match="remove it, and the cell runs again") as caught:
        store.load()
    assert str(path) in str(caught.value)


def test_a_damaged_line_of_the_archive_is_named(tmp_path, result_of):
    store = Store(str(tmp_path))
    store.archive([result_of(CELL)])
    with (tmp_path / "results.jsonl").open("a") as file:
        file.write('{"cell": 3}\n')
    with pytest.raises(RankFlowError, match=r"results\.jsonl, line 2 is not a result"):
        store.load()


def test_a_write_that_is_interrupted_leaves_the_older_result(tmp_path, result_of, monkeypatch):
    store = Store(str(tmp_path))
    store.save(result_of(CELL))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        store.save(result_of(CELL, metrics={"excess": 0.25}))
    assert only(store).metrics == {"excess": 0.5}


def test_a_folder_of_a_cell_may_hold_checkpoints(tmp_path, result_of):
    store = Store(str(tmp_path))
    result = result_of(CELL)
    store.save(result)
    folder = store.local_folder(CELL, result.provenance.digest)
    assert folder.is_dir()
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "trainer_state.json").write_text("{}")
    assert only(store) == result


def test_a_remote_store_has_no_folder_for_checkpoints():
    assert Store("memory://ablations").local_folder(CELL, "x") is None


def test_an_address_that_cannot_be_opened_says_what_to_do():
    with pytest.raises(RankFlowError, match="nowhere://x"):
        Store("nowhere://x").load()


def test_every_cell_has_a_folder_of_its_own(tmp_path):
    others = [
        replace(CELL, task="other"),
        replace(CELL, budget="41,472 parameters"),
        replace(CELL, split="validation"),
        replace(CELL, seed=4),
        replace(CELL, rate=0.2),
        replace(CELL, scaling=1.0),
    ]
    paths = {cell_path(cell, "d") for cell in [CELL, *others]} | {cell_path(CELL, "e")}
    assert len(paths) == 8
    assert all(Path(path).parts[0] == "cells" and len(Path(path).parts) == 5 for path in paths)
