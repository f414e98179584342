import json
import os
from dataclasses import replace

import pytest
import torch

from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.methods.registry import METHODS
from rankflow.ablation.records import Cell, RankHistory, RankMoment
from rankflow.ablation.trainer import CellTrainer
from rankflow.ablation.worker import CellRunner, Order
from rankflow.checkpoint import find_checkpoint

SITES = 2 * (4 * (16 + 16) + 2 * (16 + 32))  # in + out of all sites of the tiny encoder
HEAD = 16 * 2 + 2


def cell_of(method, seed=0, rate=0.02, task="encoder", split="test", **fields):
    return Cell(task, "rank 2", method, split, seed, rate, **fields)


def record_rows(runner, task="encoder"):
    """Record the rows of every batch that the runner collates from now on."""
    workload, seen = runner.workload(task), []

    def collate(rows):
        seen.append([tuple(row["input_ids"]) for row in rows])
        return workload.collate(rows)

    runner._workloads[task] = replace(workload, collate=collate)
    return seen


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_all_methods_see_the_same_rows_in_the_same_order(texts, strategy):
    runner = CellRunner(texts("train.train_sampling_strategy=" + strategy))
    seen, orders = record_rows(runner), {}
    methods = ("lora", "lora-1.5x", "dora", "hybrid", "random-allocation", "full", "adapter", "oft")
    for method in methods:
        seen.clear()
        assert runner.run(Order(cell_of(method, rate=METHODS[method].rate))).status == "done"
        orders[method] = seen[:3]
    assert all(order == orders["lora"] for order in orders.values())
    seen.clear()
    runner.run(Order(cell_of("lora", seed=1)))
    assert seen[:3] != orders["lora"]


def test_all_methods_start_from_the_same_head(texts, monkeypatch):
    heads = {}

    def stop(trainer, **_):
        for name, value in trainer.model.named_parameters():
            if "classifier" in name and "original_module" not in name:
                heads.setdefault(name.rpartition(".")[2], []).append(value.detach().clone())
        raise RuntimeError("stopped")

    monkeypatch.setattr(CellTrainer, "train", stop)
    runner = CellRunner(texts())
    for method in ("lora", "dora", "hybrid", "full", "bitfit", "adapter", "oft"):
        assert "stopped" in runner.run(Order(cell_of(method))).reason
    assert set(heads) == {"weight", "bias"}
    for values in heads.values():
        assert len(values) == 7
        assert all(torch.equal(value, values[0]) for value in values)
        assert values[0].numel() in (32, 2)


def test_the_same_cell_gives_the_same_numbers_whatever_ran_before(texts, measured):
    spec = texts()
    fresh = CellRunner(spec).run(Order(cell_of("hybrid")))
    runner = CellRunner(spec)
    runner.run(Order(cell_of("full", seed=5)))
    torch.rand(7)
    assert measured([runner.run(Order(cell_of("hybrid")))]) == measured([fresh])
    assert fresh.status == "done"


def test_parameters_are_counted_exactly(texts):
    runner = CellRunner(texts())
    assert runner.parameters_of("encoder", "rank 2") == 2 * SITES
    found = {m: runner.run(Order(cell_of(m))).parameters for m in ("lora", "full", "lora-1.5x")}
    lora, full, more = found["lora"], found["full"], found["lora-1.5x"]
    assert (lora.budget, lora.final, lora.head) == (2 * SITES, 2 * SITES, HEAD)
    assert (lora.peak, lora.stored, lora.size) == (2 * SITES, 2 * SITES, None)
    assert (more.budget, more.final) == (2 * SITES, 3 * SITES)
    encoder = sum(
        p.numel()
        for n, p in runner.workload("encoder").build_meta().model.named_parameters()
        if not n.startswith("classifier.")
    )
    assert (full.final, full.peak, full.stored, full.head) == (encoder, encoder, encoder, HEAD)


def test_the_budget_may_be_given_in_parameters(texts):
    spec = texts("budgets=[{ params = 500 }]")
    result = CellRunner(spec).run(Order(replace(cell_of("lora"), budget="500 parameters")))
    assert result.parameters.budget == 500
    assert 500 - 32 < result.parameters.final <= 500  # less than one component is left


def test_what_dynamic_ranks_reach_on_the_way_is_told_apart(texts):
    result = CellRunner(texts("train.max_steps=10")).run(Order(cell_of("dynamic-rank-dora")))
    moments = result.ranks.moments
    assert result.parameters.peak == max(moment.spent for moment in moments)
    assert result.parameters.peak > result.parameters.budget >= result.parameters.final
    assert moments[-1].spent == result.parameters.final
    assert moments[0].step == 0
    steps = [moment.step for moment in moments]
    assert steps == sorted(set(steps))
    assert len(result.ranks.sites) == 12
    assert len(set(map(sum, (moment.ranks for moment in moments)))) > 1


def test_a_fixed_budget_has_one_moment(texts):
    ranks = CellRunner(texts()).run(Order(cell_of("lora"))).ranks
    assert [(m.step, m.spent, set(m.ranks)) for m in ranks.moments] == [(0, 2 * SITES, {2})]


def test_a_control_retrains_the_ranks_that_it_is_given(texts):
    sites = CellRunner(texts()).run(Order(cell_of("lora"))).ranks.sites
    learned = RankHistory(sites, (RankMoment(0, 0, (1, 2, 0) * 4, (0, 3)),))
    runner = CellRunner(texts('methods=["hybrid", "frozen-pattern"]'))
    found = runner.run(Order(cell_of("frozen-pattern"), learned=learned)).ranks.moments[-1]
    assert found.ranks == (1, 2, 0) * 4
    assert found.magnitudes == (0, 3)
    alone = runner.run(Order(cell_of("frozen-pattern")))
    assert (alone.status, "has learned no ranks" in alone.reason) == ("unsupported", True)


def test_the_head_has_a_learning_rate_of_its_own(texts, monkeypatch):
    groups = []
    create = CellTrainer.create_optimizer

    def watch(trainer, model=None):
        optimizer = create(trainer, model)
        groups.extend(
            (group["lr"], sum(p.numel() for p in group["params"]))
            for group in optimizer.param_groups
        )
        return optimizer

    monkeypatch.setattr(CellTrainer, "create_optimizer", watch)
    CellRunner(texts("head_rate=0.5")).run(Order(cell_of("bitfit", rate=0.25)))
    result = CellRunner(texts("head_rate=0.5")).run(Order(cell_of("bitfit", rate=0.25)))
    assert groups[:2] == [(0.25, result.parameters.final), (0.5, HEAD)]


def test_measurements_are_taken_where_they_are_asked_for(texts):
    runner = CellRunner(texts())
    plain = runner.run(Order(cell_of("lora")))
    assert (plain.latency, plain.peak_bytes, plain.forgetting) == (None, None, None)
    assert plain.seconds_per_step > 0
    assert plain.cpu_seconds_per_step > 0
    full = runner.run(Order(cell_of("lora"), is_measured=True))
    assert full.peak_bytes > 0
    assert min(full.latency.base, full.latency.unmerged, full.latency.merged) > 0
    assert full.metrics == plain.metrics


def test_tuning_is_judged_on_the_validation_split(texts, tmp_path):
    (tmp_path / "few.jsonl").write_text(
        "".join(json.dumps({"text": "good a", "label": label}) + "\n" for label in ("yes", "no"))
    )
    runner = CellRunner(texts("data.validation=few.jsonl"))
    tuned = runner.run(Order(cell_of("lora", split="validation")))
    assert tuned.metrics["accuracy"] == 0.5  # one text with both labels
    assert tuned.metrics != runner.run(Order(cell_of("lora"))).metrics


def test_whatever_goes_wrong_in_a_cell_is_its_result(texts, monkeypatch):
    runner = CellRunner(texts())

    def fail(error):
        def train(*_, **__):
            raise error

        monkeypatch.setattr(CellTrainer, "train", train)
        return runner.run(Order(cell_of("lora")))

    failed = fail(ValueError("no numbers"))
    assert failed.status == "failed"
    assert failed.reason.startswith("ValueError: no numbers (test_worker.py:")
    assert fail(UnsupportedError("not here")).status == "unsupported"
    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())


def test_a_cell_without_a_folder_leaves_nothing_behind(texts, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    spec = texts("train.save_strategy=steps", "train.save_steps=1")
    assert CellRunner(spec).run(Order(cell_of("lora"))).status == "done"
    assert os.listdir(empty) == []


class Killed(BaseException):
    """What a kill looks like from inside: nobody catches it."""


def killed_after(step, spec, order, monkeypatch):
    """Run a cell up to a step, and into the middle of its checkpoint."""
    save = CellTrainer.save_engine

    def save_engine(trainer, folder):
        if trainer.state.global_step >= step:
            raise Killed
        save(trainer, folder)

    with monkeypatch.context() as patch:
        patch.setattr(CellTrainer, "save_engine", save_engine)
        with pytest.raises(Killed):
            CellRunner(spec).run(order)


@pytest.mark.filterwarnings("ignore:Specified to not load vera_A and vera_B")
@pytest.mark.parametrize("method", ["lora", "hybrid", "full", "bitfit", "adapter", "oft", "vera"])
def test_a_killed_cell_goes_on_from_its_last_whole_checkpoint(
    texts, tmp_path, monkeypatch, measured, method
):
    spec = texts("train.max_steps=8", "train.save_strategy=steps", "train.save_steps=2")
    cell = cell_of(method, rate=METHODS[method].rate)
    whole = CellRunner(spec).run(Order(cell))
    order = Order(cell, folder=tmp_path / "cell")
    killed_after(6, spec, order, monkeypatch)
    assert find_checkpoint(order.folder).path == order.folder / "checkpoint-4"
    runner = CellRunner(spec)
    seen = record_rows(runner)
    resumed = runner.run(order)
    assert measured([resumed]) == measured([whole])
    assert whole.status == "done"
    assert len([rows for rows in seen if len(rows) == 4]) == 4  # steps that were left


@pytest.mark.filterwarnings("ignore:Adapter 'default'")
def test_a_method_with_state_of_its_own_begins_again(texts, tmp_path, monkeypatch, measured):
    spec = texts("train.max_steps=8", "train.save_strategy=steps", "train.save_steps=2")
    cell = cell_of("adalora")
    order = Order(cell, folder=tmp_path / "cell")
    killed_after(6, spec, order, monkeypatch)
    assert measured([CellRunner(spec).run(order)]) == measured([CellRunner(spec).run(Order(cell))])


def test_a_cell_that_was_killed_after_its_last_step_takes_none_too_many(texts, tmp_path, measured):
    spec = texts(
        "train.max_steps=4",
        "train.save_strategy=steps",
        "train.save_steps=2",
        "train.lr_scheduler_type=constant",
    )
    order = Order(cell_of("hybrid"), folder=tmp_path / "cell")
    whole = CellRunner(spec).run(order)
    assert (order.folder / "checkpoint-4").is_dir()
    assert measured([CellRunner(spec).run(order)]) == measured([whole])
