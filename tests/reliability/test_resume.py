"""A run is stopped after every step and resumed, under everything that could tell the two apart."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments

from rankflow.integrations.huggingface import RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

STEPS = 13
BUDGET = BudgetSpec(
    rank=1.5, start=2, schedule="linear", warmup=2, cooldown=3, every=3, recycle=0.3, protect=1
)
WAYS = [(parts, dropout, bf16) for parts in (1, 2) for dropout in (0.0, 0.1) for bf16 in (0, 1)]


def make_trainer(desk, folder, way):
    parts, dropout, bf16 = way
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(
        desk / "bert", hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout
    )
    config = LoraConfig(
        target_modules="all-linear", task_type="SEQ_CLS", use_dora=True, lora_dropout=dropout
    )
    chance = torch.Generator().manual_seed(1)
    tokens = torch.randint(4, 10, (40, 6), generator=chance)
    return RankFlowTrainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=STEPS,
            save_steps=1,
            logging_steps=3,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=parts,
            bf16=bool(bf16),
            learning_rate=0.02,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=[{"input_ids": row, "labels": row[0] % 2} for row in tokens],
        budget=BUDGET,
    )


def outcome(trainer):
    """Return everything that a run ends with, but for times."""
    flow = trainer.rankflow.flow
    optimizer = trainer.optimizer.state_dict()
    state = flow.state_dict()
    tensors = {
        **{name: p for name, p in trainer.model.named_parameters() if p.requires_grad},
        **{f"scorer {key}": value for key, value in state["scorer"].items()},
        **{
            f"optimizer {index} {key}": value
            for index, moments in optimizer["state"].items()
            for key, value in moments.items()
        },
    }
    return {
        "tensors": {key: value.detach().clone() for key, value in tensors.items()},
        "plain": {k: v for k, v in state.items() if k not in ("scorer", "sketch", "history")},
        "groups": optimizer["param_groups"],
        "events": [replace(event, seconds=0.0) for event in flow.history],
        "losses": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


@pytest.fixture(scope="module", params=WAYS, ids="{0[0]} micro-batches, {0[1]}, bf16 {0[2]}".format)
def whole(request, desk, tmp_path_factory):
    """A run that nothing happens to, and where its checkpoints are."""
    folder = tmp_path_factory.mktemp("whole")
    trainer = make_trainer(desk, folder, request.param)
    trainer.train()
    ended = outcome(trainer)
    assert len(ended["events"]) >= 3
    assert any(event.born for event in ended["events"])
    return request.param, folder, ended


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.fault("resume at every step x accumulation x dropout x bf16", quick=3, full=STEPS)
def test_a_resumed_run_ends_with_the_same_bits(injection, whole, desk, tmp_path, is_full):
    way, folder, ended = whole
    steps = range(1, STEPS + 1) if is_full else (2, 7, STEPS)
    trainer = make_trainer(desk, tmp_path, way)
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{steps[injection]}"))
    resumed = outcome(trainer)
    tensors, expected = resumed.pop("tensors"), ended["tensors"]
    assert tensors.keys() == expected.keys()
    assert [key for key, value in expected.items() if not torch.equal(tensors[key], value)] == []
    assert resumed == {key: value for key, value in ended.items() if key != "tensors"}
