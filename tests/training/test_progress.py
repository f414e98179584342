import io

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from rankflow.integrations.huggingface import RankFlowCallback
from rankflow.records import RankEvent
from rankflow.specs.budget import BudgetSpec
from rankflow.training.progress import ProgressBar


class Flow:
    """What the bar needs of an engine."""

    def __init__(self):
        self.sinks = []


@pytest.fixture
def shown(tmp_path):
    """A started bar of 10 steps, its engine, its console, and the Trainer's arguments to it."""
    console = Console(record=True, width=100, file=io.StringIO())
    callback = RankFlowCallback(BudgetSpec(rank=1))
    callback.flow = Flow()
    bar = ProgressBar(console, callback)
    trainer = (
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        TrainerState(max_steps=10),
        TrainerControl(),
    )
    bar.on_train_begin(*trainer)
    yield bar, callback.flow, console, trainer
    bar.close()


def test_the_bar_shows_steps_and_loss(shown):
    bar, _, console, (args, state, control) = shown
    state.global_step = 7
    bar.on_log(args, state, control, logs={"loss": "1.25"})
    bar.on_log(args, state, control, logs={"eval_loss": 9.0})
    bar.on_step_end(args, state, control)
    bar.close()
    printed = console.export_text()
    assert "7/10" in printed
    assert "loss 1.250" in printed


def test_every_event_is_a_line(shown):
    bar, flow, console, _ = shown
    ranks = {"q": 3}
    for index in range(2):
        for sink in flow.sinks:
            sink(RankEvent(index, 4 + index, 9, 9, 8, ranks, ranks, {}, (), (), 0.0))
    bar.close()
    lines = [line for line in console.export_text().splitlines() if "pruned 0" in line]
    assert [line.split("  ")[0] for line in lines] == ["step 4", "step 5"]


def test_closing_twice_does_no_harm(shown):
    shown[0].close()
    shown[0].close()
