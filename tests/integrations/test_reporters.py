import peft
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import ProgressCallback, Trainer, TrainerCallback, TrainingArguments

from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.report.tensorboard import event_scalars
from rankflow.specs.budget import BudgetSpec

BUDGET = BudgetSpec(
    rank=1.5, start=2, schedule="linear", warmup=2, cooldown=4, every=3, protect=1, grow="random"
)
STEPS = 12


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x, labels):
        return {"loss": nn.functional.cross_entropy(self.second(self.first(x)), labels)}


class Reporter(TrainerCallback):
    """Notes what W&B would get."""

    def __init__(self):
        self.entries = []
        self.ended = False

    def on_log(self, args, state, control, *, model, logs, **_):
        assert not self.ended
        self.entries.append((state.global_step, dict(logs)))

    def on_train_end(self, args, state, control, **_):
        self.ended = True

    def events(self):
        return [(step, logs) for step, logs in self.entries if "rankflow/spent" in logs]

    def losses(self):
        return [(step, logs["loss"]) for step, logs in self.entries if "loss" in logs]


class StopAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 5


def make_trainer(folder, make=RankFlowTrainer, **settings):
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=["first", "second"]))
    rows = [{"x": torch.randn(6), "labels": torch.tensor(n % 3)} for n in range(8)]
    args = TrainingArguments(
        str(folder),
        **{"max_steps": STEPS, "logging_steps": 2, "report_to": "none", "disable_tqdm": True}
        | {"use_cpu": True, "save_strategy": "no", "remove_unused_columns": False}
        | settings,
    )
    return make(model=model, args=args, train_dataset=rows)


def with_budget(**arguments):
    return RankFlowTrainer(budget=BUDGET, **arguments)


def with_callback(**arguments):
    callback = RankFlowCallback(BUDGET)
    trainer = Trainer(**arguments, callbacks=[callback])
    callback.log_to(trainer)
    trainer.rankflow = callback
    return trainer


@pytest.mark.parametrize("make", [with_budget, with_callback])
def test_a_reporter_gets_the_numbers_of_every_event_at_its_step(make, tmp_path):
    trainer, reporter = make_trainer(tmp_path, make), Reporter()
    trainer.add_callback(reporter)
    trainer.train()
    history = trainer.rankflow.flow.history
    assert len(history) >= 3
    assert reporter.events() == [(event.step, event_scalars(event)) for event in history]
    steps = [step for step, _ in reporter.entries]
    assert steps == sorted(steps)


def test_losses_are_logged_as_they_were(tmp_path):
    trainer, reporter = make_trainer(tmp_path, with_budget), Reporter()
    trainer.add_callback(reporter)
    trainer.train()
    assert [step for step, _ in reporter.losses()] == [2, 4, 6, 8, 10, 12]
    history = trainer.state.log_history
    assert [entry["step"] for entry in history if "loss" in entry] == [2, 4, 6, 8, 10, 12]
    assert not any(key.startswith("rankflow") for entry in history for key in entry)


def test_tensorboard_gets_each_number_once(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    trainer = make_trainer(tmp_path, with_budget, report_to="tensorboard")
    trainer.train()
    tags = []
    for file in tmp_path.rglob("events.out.tfevents*"):
        tags += EventAccumulator(str(file)).Reload().Tags()["scalars"]
    assert tags.count("train/loss") == 1
    assert [tag for tag in tags if tag.endswith("rankflow/spent")] == ["rankflow/spent"]


def test_the_terminal_is_spared(tmp_path, capsys):
    trainer = make_trainer(tmp_path, with_budget, disable_tqdm=False)
    assert any(isinstance(c, ProgressCallback) for c in trainer.callback_handler.callbacks)
    trainer.train()
    shown = capsys.readouterr()
    assert "'loss'" in shown.out + shown.err
    assert "rankflow/spent" not in shown.out + shown.err


def test_what_is_pruned_after_the_reporters_have_ended_is_not_sent(tmp_path, caplog):
    trainer, reporter = make_trainer(tmp_path, with_budget), Reporter()
    trainer.add_callback(StopAt())
    trainer.callback_handler.callbacks.insert(0, reporter)
    trainer.train()
    last = trainer.rankflow.flow.history[-1]
    assert "were pruned" in caplog.text
    assert reporter.ended
    assert event_scalars(last) not in [logs for _, logs in reporter.events()]


def test_sinks_of_ones_own_take_the_place_of_reports(tmp_path):
    seen = []

    def make(**arguments):
        return RankFlowTrainer(budget=BUDGET, sinks=[seen.append], **arguments)

    trainer, reporter = make_trainer(tmp_path, make), Reporter()
    trainer.add_callback(reporter)
    trainer.train()
    assert seen == trainer.rankflow.flow.history
    assert reporter.events() == []
