"""What a Trainer with the callback, and RankFlowTrainer, do about weights and steps gone bad."""

import peft
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments

from rankflow.checkpoint import find_checkpoint
from rankflow.errors import DivergenceError
from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

BUDGET = BudgetSpec(rank=1.5, policy="uniform")  # no event looks at the weights


class Poison(TrainerCallback):
    """Puts a number into a weight after a step, as an optimizer may do."""

    def __init__(self, step, where):
        self.step, self.where = step, where

    def on_optimizer_step(self, args, state, control, *, model, **_):
        if state.global_step + 1 == self.step:
            names = [n for n, p in model.named_parameters() if p.requires_grad and self.where in n]
            model.get_parameter(names[0]).data.view(-1)[0] = float("inf")


def make_trainer(kind, folder, callbacks=(), max_bad_steps=20, **settings):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
    )
    lora = peft.LoraConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")
    model = peft.get_peft_model(transformers.BertForSequenceClassification(config), lora)
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    rows = [
        {"input_ids": tokens, "labels": tokens[0] % 3} for tokens in torch.randint(1, 13, (8, 6))
    ]
    arguments = {"model": model, "args": args, "train_dataset": rows}
    if kind == "RankFlowTrainer":
        arguments |= {"budget": BUDGET, "max_bad_steps": max_bad_steps}
        return RankFlowTrainer(**arguments, callbacks=list(callbacks))
    callback = RankFlowCallback(BUDGET, max_bad_steps=max_bad_steps)
    return Trainer(**arguments, callbacks=[callback, *callbacks])


@pytest.fixture(params=["Trainer", "RankFlowTrainer"])
def kind(request):
    return request.param


@pytest.mark.parametrize("where", ["lora_B", "classifier"])
@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_weights_that_are_not_finite_are_never_saved(kind, where, strategy, tmp_path):
    trainer = make_trainer(kind, tmp_path, [Poison(3, where)], save_strategy=strategy, save_steps=2)
    with pytest.raises(DivergenceError, match=r"not finite; training has diverged by step 4"):
        trainer.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert find_checkpoint(tmp_path).path == tmp_path / "checkpoint-2"


def test_a_run_whose_weights_are_not_finite_does_not_finish(kind, tmp_path):
    trainer = make_trainer(kind, tmp_path, [Poison(6, "lora_B")], save_strategy="no")
    with pytest.raises(DivergenceError, match=r"of site .* by step 6"):
        trainer.train()


class LateSave(TrainerCallback):
    """Asks for a checkpoint after the callback of RankFlow has looked at the step."""

    def on_step_end(self, args, state, control, **_):
        control.should_save = state.global_step == 3


def test_a_checkpoint_that_is_asked_for_late_is_not_written_or_not_resumable(kind, tmp_path):
    callbacks = [Poison(3, "lora_B"), LateSave()]
    trainer = make_trainer(kind, tmp_path, callbacks, save_strategy="no")
    with pytest.raises(DivergenceError, match="by step 3"):
        trainer.train()
    assert find_checkpoint(tmp_path).path is None


def test_a_gradient_scaler_sees_the_overflow_that_it_has_to_answer(tmp_path):
    """Muted, the step would look fine to it, and it would never lower its scale."""
    trainer = make_trainer("RankFlowTrainer", tmp_path)
    callback = trainer.rankflow
    callback.start(trainer.model, 6, None)
    Accelerator(cpu=True)  # its optimizers ask for the state of the process
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(trained)
    scaled = AcceleratedOptimizer(plain, scaler=torch.amp.GradScaler("cpu"))
    for optimizer, is_muted in ((plain, True), (scaled, False)):
        for parameter in trained:
            parameter.grad = torch.full_like(parameter, float("inf"))
        callback.on_pre_optimizer_step(
            trainer.args, TrainerState(), trainer.control, optimizer=optimizer
        )
        assert all(bool(torch.isfinite(p.grad).all()) is is_muted for p in trained)
    callback.flow.close()


def test_a_loss_that_is_not_finite_counts_where_its_gradients_are(tmp_path):
    trainer = make_trainer("RankFlowTrainer", tmp_path, max_bad_steps=3)
    inner = trainer.compute_loss

    def compute_loss(*arguments, **keywords):
        return inner(*arguments, **keywords) + float("inf")

    trainer.compute_loss = compute_loss
    with pytest.raises(DivergenceError, match="3 steps in a row had a loss that is not finite"):
        trainer.train()
