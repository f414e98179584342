"""The trainer of a text classifier that pools the logits of a stock token classifier."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from torch.nn import functional
from transformers import TrainingArguments

from rankflow.integrations.huggingface import RankFlowTrainer
from rankflow.report.sink import EventSink
from rankflow.specs.budget import BudgetSpec
from rankflow.training.metrics import measure_predictions
from rankflow.training.pooling import TokenPooling, pool
from rankflow.training.tokens import Collator


class PooledTrainer(RankFlowTrainer):
    """A RankFlowTrainer whose loss compares one label per text with pooled token logits.

    Args:
        pooling: How the logits of a text's tokens become one row.
        model: A token classifier under a PEFT adapter.
        args: Training arguments.
        train_dataset: Tokenised rows with one label each.
        eval_dataset: The same, to evaluate on.
        data_collator: Pads rows into a batch.
        budget: The parameter budget.
        sinks: Called with every reallocation.
    """

    # The loss is the mean over a micro-batch: the Trainer divides it by their number.
    loss_is_scaled_for_ga = False

    def __init__(
        self,
        pooling: TokenPooling,
        *,
        model: PeftModel,
        args: TrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        data_collator: Collator,
        budget: BudgetSpec,
        sinks: Sequence[EventSink],
    ) -> None:
        self._pooling: TokenPooling = pooling
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=data_collator,
            compute_metrics=measure_predictions,
            budget=budget,
            sinks=sinks,
        )

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the cross entropy of the pooled logits, and the logits if asked for."""
        features = {key: value for key, value in inputs.items() if key != "labels"}
        token_logits = model(**features).logits  # (batch, tokens, classes)
        logits = pool(token_logits, inputs["attention_mask"], self._pooling)  # (batch, classes)
        loss = functional.cross_entropy(logits, inputs["labels"])
        return (loss, {"loss": loss, "logits": logits}) if return_outputs else loss
