import io
import json
from pathlib import Path

import pytest
from datasets import Dataset
from rich.console import Console
from rich.filesize import decimal
from torch import nn
from transformers import BertForTokenClassification, Trainer, TrainingArguments
from typer.testing import CliRunner

from rankflow.cli import app
from rankflow.errors import BudgetError
from rankflow.specs.run import load_run
from rankflow.training.plan import plan_run
from rankflow.training.run import train
from rankflow.training.run_budget import count_steps

RUN = """
name = "trial"

[model]
name = "{model}"
task = "sequence-classification"
pooling = "mean"

[data]
train = "{rows}"
max_length = 16

[adapter]
use_dora = true

[budget]
rank = 3
start = 1.5
schedule = "cubic"
every = 3

[train]
output_dir = "{folder}"
max_steps = 20
use_cpu = true
save_strategy = "no"
report_to = "none"
"""


@pytest.fixture
def run_file(tmp_path, write_rows, sentiment_rows, bert_folder):
    path = tmp_path / "run.toml"
    rows = write_rows("rows.jsonl", sentiment_rows)
    path.write_text(RUN.format(model=bert_folder, rows=rows, folder=tmp_path / "out"))
    return path


def plan(path, *overrides, measure=False):
    console = Console(record=True, width=100, file=io.StringIO())
    planned = plan_run(load_run(path, overrides), console=console, measure=measure)
    return planned, console.export_text()


def test_the_plan_is_what_training_then_does(run_file):
    planned, _ = plan(run_file)
    done = train(load_run(run_file), console=Console(file=io.StringIO()))
    assert {site.name for site in planned.sites} == set(done.ranks)
    assert (planned.target, planned.head) == (done.target, done.head)
    assert len(planned.events) == done.events
    assert planned.events[-1].budget == done.target


def test_the_plan_of_gated_components_counts_their_gates(run_file):
    plain, _ = plan(run_file)
    gated, shown = plan(run_file, "budget.components=gated")
    assert (gated.target, gated.head, gated.base) == (plain.target, plain.head, plain.base)
    for ordinary, site in zip(plain.sites, gated.sites, strict=True):
        assert site.component_cost == ordinary.component_cost + 1
    assert f"{gated.sites[0].component_cost:,}" in shown
    done = train(
        load_run(run_file, ["budget.components=gated"]), console=Console(file=io.StringIO())
    )
    assert (gated.target, gated.head) == (done.target, done.head)
    assert done.spent <= done.target


@pytest.mark.parametrize("magnitude", ["never", "budgeted"])
def test_the_plan_knows_what_becomes_of_magnitudes(magnitude, run_file):
    always, _ = plan(run_file)
    planned, printed = plan(run_file, f"budget.magnitude={magnitude}")
    magnitudes = sum(site.out_features for site in planned.sites)
    lowest, highest = always.feasible
    assert lowest == magnitudes
    is_budgeted = magnitude == "budgeted"
    assert planned.feasible == (0, highest if is_budgeted else highest - magnitudes)
    assert planned.head == always.head
    row = next(line for line in printed.splitlines() if "attention.self.query" in line)
    assert row.split()[-2] == (str(planned.sites[0].out_features) if is_budgeted else "0")
    done = train(
        load_run(run_file, [f"budget.magnitude={magnitude}"]), console=Console(file=io.StringIO())
    )
    assert (planned.target, planned.head) == (done.target, done.head)


def test_the_plan_of_vera_counts_its_vectors_alone(run_file):
    changes = ["budget.components=vera", "budget.max_rank=8", "budget.start=1.0"]
    changes += ["budget.schedule=constant", "budget.rank=null", "budget.params=500"]
    planned, _ = plan(run_file, *changes)
    assert {site.component_cost for site in planned.sites} == {1}
    assert all(site.fixed_cost == 2 * site.out_features for site in planned.sites)
    done = train(load_run(run_file, changes), console=Console(file=io.StringIO()))
    assert (planned.target, planned.head) == (done.target, done.head)
    assert done.spent <= done.target


def test_planning_needs_no_weights(run_file, bert_folder):
    (Path(bert_folder) / "model.safetensors").unlink()
    planned, _ = plan(run_file)
    assert len(planned.sites) == 12


def test_planning_writes_nothing(run_file, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    plan(run_file)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "datasets") == before


def test_a_measured_plan_compares_the_estimate_with_real_steps(run_file):
    planned, printed = plan(run_file, measure=True)
    memory = planned.memory
    share = memory.estimate.peak / memory.measured.peak - 1
    assert f"{abs(share):.1%} {'above' if share >= 0 else 'below'}" in printed
    assert f"measured    {decimal(memory.measured.peak)}" in printed


def test_a_plan_is_given_to_a_script(run_file):
    result = CliRunner().invoke(app, ["plan", str(run_file), "--json"])
    found = json.loads(result.stdout)
    assert (found["target"], found["steps"]) == (found["events"][-1]["budget"], 20)
    assert found["events"][0]["step"] > 0
    assert found["sites"][0]["name"] == "bert.encoder.layer.0.attention.self.query"
    assert found["memory"]["estimate"]["peak"] > found["memory"]["estimate"]["weights"] > 0
    assert found["memory"]["measured"] is None
    assert "at the peak of a step" in result.stderr


def test_a_model_that_needs_numbers_has_a_plan_all_the_same(run_file, monkeypatch):
    forward = BertForTokenClassification.forward

    def send_by_index(self, input_ids=None, attention_mask=None, labels=None, **_):
        input_ids = input_ids[input_ids.sum(dim=1).nonzero().flatten()]
        return forward(self, input_ids, attention_mask, labels=labels)

    monkeypatch.setattr(BertForTokenClassification, "forward", send_by_index)
    planned, printed = plan(run_file)
    assert planned.memory.estimate is None
    assert "nonzero" in planned.memory.unknown
    assert f"memory      not estimated: {planned.memory.unknown}" in printed


def test_a_budget_out_of_reach_is_refused_with_the_feasible_range(run_file):
    planned, _ = plan(run_file)
    with pytest.raises(BudgetError, match=rf"at most {planned.feasible[1]:,}"):
        plan(run_file, f"budget.params={planned.feasible[1] + 1}", "budget.start=1")


def test_a_budget_that_never_moves_has_no_events(run_file):
    fixed = ("budget.schedule=constant", "budget.start=1", "budget.policy=uniform")
    planned, printed = plan(run_file, *fixed)
    assert planned.events == ()
    assert "with 0 reallocations" in printed


def test_the_print_shows_sites_costs_budgets_events_and_memory(run_file):
    planned, printed = plan(run_file)
    assert "layer.*.attention.self.query" in printed
    assert f"{planned.start:,} parameters at first, {planned.target:,} at the end" in printed
    assert f"{planned.feasible[0]:,} to {planned.feasible[1]:,}" in printed
    first = planned.events[0]
    assert f"{first.step}" in printed
    assert f"{first.budget:,}" in printed
    assert f"{decimal(planned.memory.estimate.peak)} at the peak of a step" in printed
    assert "for 8 rows of 9 tokens on cpu" in printed
    assert "measured" not in printed


@pytest.mark.parametrize("rows", [7, 8])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_steps_are_counted_as_the_trainer_counts_them(rows, accumulate, drop_last, tmp_path):
    args = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        num_train_epochs=2.5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulate,
        dataloader_drop_last=drop_last,
        use_cpu=True,
    )
    data = Dataset.from_dict({"input": [[2.0]] * rows})
    trainer = Trainer(model=nn.Linear(1, 1), args=args, train_dataset=data)
    loader = trainer.get_train_dataloader()
    steps = trainer.set_initial_training_values(args, loader)[-1]
    assert count_steps(data, args) == steps
