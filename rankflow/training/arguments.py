"""The training arguments of a run."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainingArguments

from rankflow.errors import SpecError, brief
from rankflow.specs.run import RunSpec


def make_arguments(spec: RunSpec) -> TrainingArguments:
    """Build ``TrainingArguments`` from ``[train]``, whose keys win over the defaults here.

    Raises:
        SpecError: transformers refuses them, or something that they need is not there.
    """
    is_language_model = spec.model.task in ("causal-lm", "seq2seq-lm")
    defaults: dict[str, Any] = {
        "report_to": "tensorboard",
        "logging_steps": 10,
        "disable_tqdm": True,  # the run draws a bar of its own
        "dataloader_pin_memory": torch.cuda.is_available(),  # warns on a machine without
        "prediction_loss_only": is_language_model,  # logits over a vocabulary would fill memory
    }
    if _are_several() and not torch.accelerator.is_available():
        defaults["use_cpu"] = True  # else every process trains by itself
    with refusals():
        return TrainingArguments(**defaults | spec.train)


def _are_several() -> bool:
    """Whether a launcher has started several processes, which the arguments bring together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def refusals() -> Iterator[None]:
    """Turn what transformers refuses of ``[train]`` into an error of the spec."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise refusal(error) from error


def refusal(error: Exception) -> SpecError:
    """Return the error of a spec whose ``[train]`` transformers refuses."""
    return SpecError(
        f"[train]: transformers refuses it: {brief(error)}; change or remove the key that asks "
        "for it"
    )
