"""The training arguments of a run."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler

from rankflow.errors import SpecError, brief
from rankflow.specs.reading import suggest
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
        args = TrainingArguments(**defaults | spec.train)
    _check_metric(args, ("loss",) if is_language_model else ("accuracy", "loss", "nll"))
    return args


def check_optimizer(args: TrainingArguments, model: PreTrainedModel | PeftModel) -> None:
    """Refuse an optimizer or a schedule that could not be made when training begins.

    Raises:
        SpecError: transformers refuses it, or something that it needs is not there.
    """
    with refusals(f" optim = '{args.optim}', optim_args = '{args.optim_args or ''}'"):
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    name, settings = args.lr_scheduler_type, args.lr_scheduler_kwargs
    with refusals(f" lr_scheduler_type = '{name}', lr_scheduler_kwargs = {settings}"):
        get_scheduler(
            name,
            torch.optim.SGD([torch.zeros(1)]),
            num_warmup_steps=1,
            num_training_steps=2,
            scheduler_specific_kwargs=settings,
        )


def _check_metric(args: TrainingArguments, measured: Sequence[str]) -> None:
    metric = args.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") not in measured:
        raise SpecError(
            f"[train] metric_for_best_model = '{metric}': it is not measured; "
            f"{suggest(metric, measured)} Measured are {', '.join(measured)}"
        )


def _are_several() -> bool:
    """Whether a launcher has started several processes, which the arguments bring together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextmanager
def refusals(keys: str = "") -> Iterator[None]:
    """Turn what transformers refuses of ``[train]`` into an error of the spec."""
    try:
        yield
    except (ValueError, TypeError, ImportError, RuntimeError, OverflowError) as error:
        raise refusal(error, keys) from error


def refusal(error: Exception, keys: str = "") -> SpecError:
    """Return the error of a spec whose ``[train]`` transformers refuses."""
    return SpecError(
        f"[train]{keys}: transformers refuses it: {brief(error)}; change or remove the key that "
        "asks for it"
    )
