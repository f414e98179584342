"""Under a Trainer, too, the hooks of the callback wait for nothing between events."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

BUDGET = BudgetSpec(rank=2, warmup=3, every=3, cooldown=2, recycle=0.9, hysteresis=0.0, protect=0)


class Enter(TrainerCallback):
    """Looks at every step but those of events; ``Leave`` comes after what is looked at."""

    def __init__(self, waits, steering):
        self.waits, self.steering = waits, steering
        self.noted, self.places = None, []

    def on_step_begin(self, args, state, control, **_):
        scheduler = self.steering.flow.resolved.scheduler
        if not scheduler.is_due(state.global_step + 1):
            self.noted = self.waits("cpu")
            self.noted.__enter__()


class Leave(TrainerCallback):
    def __init__(self, entered):
        self.entered = entered

    def on_step_end(self, args, state, control, **_):
        noted, self.entered.noted = self.entered.noted, None
        if noted is not None:
            noted.__exit__(None, None, None)
            self.entered.places += noted.places


@pytest.mark.usefixtures("as_on_a_device")
@pytest.mark.parametrize("is_plain", [False, True])
def test_the_callbacks_hooks_wait_for_nothing(is_plain, llama, adapt, waits, tmp_path):
    model = adapt(llama(), target_modules="all-linear", use_dora=True)
    rows = [{"input_ids": torch.arange(6) + i, "labels": torch.arange(6)} for i in range(6)]
    arguments = {
        "model": model,
        "args": TrainingArguments(
            str(tmp_path), max_steps=9, save_strategy="no", disable_tqdm=True, use_cpu=True
        ),
        "train_dataset": rows,
    }
    if is_plain:
        steering = RankFlowCallback(BUDGET)
        trainer = Trainer(**arguments, callbacks=[steering])
    else:
        trainer = RankFlowTrainer(**arguments, budget=BUDGET)
        steering = trainer.rankflow
    enter = Enter(waits, steering)
    trainer.add_callback(enter)
    trainer.add_callback(Leave(enter))
    trainer.train()
    assert enter.places == []
    assert len(steering.flow.history) == 3
