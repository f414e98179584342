"""The training arguments of a run."""

from typing import Any

import torch
from transformers import TrainingArguments

from rankflow.specs.run import RunSpec


def make_arguments(spec: RunSpec) -> TrainingArguments:
    """Build ``TrainingArguments`` from ``[train]``, whose keys win over the defaults here."""
    is_language_model = spec.model.task in ("causal-lm", "seq2seq-lm")
    defaults: dict[str, Any] = {
        "report_to": "tensorboard",
        "logging_steps": 10,
        "disable_tqdm": True,  # the run draws a bar of its own
        "dataloader_pin_memory": torch.cuda.is_available(),  # warns on a machine without
        "prediction_loss_only": is_language_model,  # logits over a vocabulary would fill memory
    }
    return TrainingArguments(**defaults | spec.train)
