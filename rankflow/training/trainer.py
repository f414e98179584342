"""The trainers of a run: stock losses, and the one of a classifier that pools token logits."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import TrainingArguments

from rankflow.integrations.huggingface import RankFlowTrainer, Sink
from rankflow.specs.run import RunSpec
from rankflow.training.arguments import check_optimizer, refusal, refusals
from rankflow.training.job import Job
from rankflow.training.metrics import measure_predictions
from rankflow.training.pooling import TokenPooling, pool


class PooledTrainer(RankFlowTrainer):
    """A RankFlowTrainer whose loss compares one label per text with pooled token logits.

    Args:
        pooling: How the logits of a text's tokens become one row.
        **arguments: Everything that ``RankFlowTrainer`` takes.
    """

    # The loss is the mean over a micro-batch, so the Trainer divides it by their number.
    loss_is_scaled_for_ga = False

    def __init__(self, *, pooling: TokenPooling, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._pooling: TokenPooling = pooling

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the cross entropy of the pooled logits, and these logits if asked for."""
        return pooled_loss(model, inputs, self._pooling, return_outputs)


def pooled_loss(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    pooling: TokenPooling,
    return_outputs: bool = False,
) -> Any:
    """Compare one label per text with its pooled token logits.

    Args:
        model: A token classifier; the logits of virtual tokens, if any, come first.
        inputs: A batch: ``labels`` of shape ``(batch,)``, and what the model takes.
        pooling: How the logits of a text's tokens become one row.
        return_outputs: Whether to return these logits too.

    Returns:
        The mean cross entropy; with outputs a pair of it and a dict that holds ``logits``, of
        shape ``(batch, classes)``.
    """
    features = {key: value for key, value in inputs.items() if key != "labels"}
    token_logits = model(**features).logits  # (batch, tokens, classes)
    logits = pool(token_logits, inputs["attention_mask"], pooling)  # (batch, classes)
    loss = functional.cross_entropy(logits, inputs["labels"])
    return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss


def make_trainer(
    spec: RunSpec, job: Job, args: TrainingArguments, sinks: Sequence[Sink] | None = None
) -> RankFlowTrainer:
    """Build the trainer that the task needs; ``sinks`` are those of ``RankFlowCallback``.

    Raises:
        SpecError: ``[train]`` asks for what the rows or the machine do not have.
    """
    arguments = {
        "model": job.model,
        "args": args,
        "train_dataset": job.splits["train"],
        "eval_dataset": job.splits.get("validation"),
        "data_collator": job.collate,
        "compute_metrics": measure_predictions if job.data.labels else None,
        "budget": spec.budget,
        "sinks": sinks,
    }
    with refusals():
        if spec.model.task == "sequence-classification" and spec.model.pooling != "model":
            trainer: RankFlowTrainer = PooledTrainer(pooling=spec.model.pooling, **arguments)
        else:
            trainer = RankFlowTrainer(**arguments)
    check_optimizer(args, job.model)
    return trainer


def start_training(trainer: RankFlowTrainer, resume_from: str | None = None) -> None:
    """Train from the first step, or from a checkpoint's, to the last.

    Raises:
        SpecError: ``[train]`` asks for an optimizer, a schedule or a kernel that is not there.
    """
    try:
        trainer.train(resume_from_checkpoint=resume_from)
    except (ValueError, ImportError) as error:
        if trainer.rankflow.flow is not None:  # it had begun
            raise
        raise refusal(error) from error
