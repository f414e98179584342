import copy
import logging
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankflow.errors import CheckpointError, RankFlowError
from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.report.events import read_events
from rankflow.specs.budget import BudgetSpec

STEPS = 16
MOVES = {"rank": 1.5, "warmup": 2, "cooldown": 4, "every": 3, "decay": 0.5, "protect": 1}
PRUNE = BudgetSpec(**MOVES, start=2, schedule="linear", recycle=0.2, hysteresis=0.1)
REALLOCATE = BudgetSpec(**MOVES, recycle=0.5, hysteresis=0.1)
EVENT_STEPS = [2, 5, 8, 11, 12]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost these tiny tensors twenty times their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_base(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def make_model(*, dropout=0.1, adapter_name="default", **config):
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["query", "value", "dense"],
        "task_type": "SEQ_CLS",
    } | config
    return peft.get_peft_model(make_base(dropout), peft.LoraConfig(**config), adapter_name)


def make_data(rows=24):
    tokens = torch.randint(1, 13, (rows, 6), generator=torch.Generator().manual_seed(2))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3}
        for row in tokens
    ]


def make_arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**settings | changes)


class Spy(TrainerCallback):
    """Notes what the model is after every step and at every checkpoint."""

    def __init__(self):
        self.logits = {}
        self.parameters = []

    def on_step_end(self, args, state, control, *, model, **_):
        self.parameters.append(copy.deepcopy(adapter_parameters(model)))

    def on_save(self, args, state, control, *, model, **_):
        self.logits[f"checkpoint-{state.global_step}"] = logits_of(model)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def make_trainer(host, folder, budget=PRUNE, *, model=None, callbacks=(), settings=None, **more):
    """Build a plain Trainer with the callback, or a RankFlowTrainer; return it with a callback."""
    arguments = {
        "model": make_model() if model is None else model,
        "args": make_arguments(folder, **(settings or {})),
        "train_dataset": make_data(),
    } | more
    if host == "RankFlowTrainer":
        trainer = RankFlowTrainer(**arguments, budget=budget, callbacks=list(callbacks))
        return trainer, trainer.rankflow
    callback = RankFlowCallback(budget)
    return Trainer(**arguments, callbacks=[callback, *callbacks]), callback


def adapter_parameters(model):
    return {n: p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}


def recount(model):
    return sum(p.numel() for p in adapter_parameters(model).values())


@torch.no_grad()
def logits_of(model):
    was_training = model.training
    model.eval()
    rows = make_data()[:5]
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}
    logits = model(**inputs).logits
    model.train(was_training)
    return logits


def untimed(history):
    return [replace(event, seconds=0.0) for event in history]


@pytest.fixture(params=["Trainer", "RankFlowTrainer"])
def host(request):
    return request.param


@pytest.mark.parametrize("budget", [PRUNE, REALLOCATE], ids=["prune", "reallocate"])
def test_training_ends_within_the_budget(host, budget, tmp_path, use_dora):
    model = make_model(use_dora=use_dora)
    trainer, callback = make_trainer(host, tmp_path, budget, model=model)
    trainer.train()
    flow = callback.flow
    target = int(1.5 * sum(site.component_cost for site in flow.resolved.sites))
    assert flow.steps == STEPS
    assert flow.spent == recount(model) <= flow.limit == target
    assert [event.step for event in flow.history] == EVENT_STEPS
    assert any(event.born for event in flow.history)
    assert any(event.pruned for event in flow.history)


def test_the_event_log_holds_the_history(host, tmp_path):
    trainer, callback = make_trainer(host, tmp_path)
    trainer.train()
    assert read_events(tmp_path / "events.jsonl") == callback.flow.history


def test_the_learning_rate_decays_and_every_site_moves_across_the_events(host, tmp_path):
    spy = Spy()
    trainer, callback = make_trainer(host, tmp_path, REALLOCATE, callbacks=[spy])
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [0.02 * (1 - step / STEPS) for step in range(STEPS)]
    assert rates == pytest.approx(expected)
    assert len(spy.parameters) == STEPS
    for event in callback.flow.history:
        before, after = spy.parameters[event.step - 1], spy.parameters[event.step + 1]
        alive = [name for name, parameter in before.items() if parameter.numel()]
        assert alive
        assert all(not torch.equal(before[name], after[name]) for name in alive)


def test_accumulated_and_clipped_gradients_decide_like_the_whole_batch(host, tmp_path):
    runs = []
    for parts in (1, 2):
        settings = {
            "per_device_train_batch_size": 4 // parts,
            "gradient_accumulation_steps": parts,
            "max_grad_norm": 0.05,
        }
        trainer, callback = make_trainer(
            host, tmp_path / str(parts), model=make_model(dropout=0.0), settings=settings
        )
        trainer.train()
        assert trainer.state.global_step == callback.flow.steps == STEPS
        assert callback.flow.spent == recount(trainer.model) <= callback.flow.limit
        runs.append(callback.flow.history)
    assert [event.ranks for event in runs[0]] == [event.ranks for event in runs[1]]


def test_bf16_training_ends_within_the_budget(host, tmp_path):
    trainer, callback = make_trainer(host, tmp_path, settings={"bf16": True})
    trainer.train()
    assert callback.flow.spent == recount(trainer.model) <= callback.flow.limit
    assert len(callback.flow.history) == len(EVENT_STEPS)


def test_every_checkpoint_loads_in_stock_peft_with_the_same_outputs(host, tmp_path, use_dora):
    spy = Spy()
    trainer, callback = make_trainer(
        host,
        tmp_path,
        BudgetSpec(**MOVES | {"rank": 0.8}, start=3, schedule="linear"),
        model=make_model(use_dora=use_dora),
        callbacks=[spy],
        settings={"save_strategy": "steps", "save_steps": 3},
    )
    trainer.train()
    assert len(spy.logits) == 6
    assert len({tuple(event.ranks.values()) for event in callback.flow.history}) > 2
    for name, live in spy.logits.items():
        stock = peft.PeftModel.from_pretrained(make_base(), tmp_path / name)
        assert (logits_of(stock) - live).abs().max() <= 1e-5


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 6, 12, 15])
@pytest.mark.parametrize("budget", [PRUNE, REALLOCATE], ids=["prune", "reallocate"])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(
    checkpoint, budget, tmp_path, use_dora
):
    settings = {"save_strategy": "steps", "save_steps": 1}
    trainer, callback = make_trainer(
        "RankFlowTrainer", tmp_path, budget, model=make_model(use_dora=use_dora), settings=settings
    )
    trainer.train()
    expected = adapter_parameters(trainer.model)
    resumed, again = make_trainer(
        "RankFlowTrainer", tmp_path, budget, model=make_model(use_dora=use_dora), settings=settings
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{checkpoint}"))
    assert untimed(again.flow.history) == untimed(callback.flow.history)
    actual = adapter_parameters(resumed.model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert read_events(tmp_path / "events.jsonl") == again.flow.history
