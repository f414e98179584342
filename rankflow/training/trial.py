"""The first steps of a run on its longest rows: how much memory does training take at most?

The trainer is the run's own, with its engine, optimizer, precision and checkpointing. A trial on
fake tensors estimates; one on the real model measures.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.memory import storage_bytes
from rankflow.specs.run import RunSpec
from rankflow.training.arguments import make_arguments
from rankflow.training.job import Job
from rankflow.training.trainer import make_trainer, start_training

Count = Callable[[Callable[[], None], Iterable[Tensor]], int]
"""Runs a computation and returns the most bytes that tensors hold at a time: those that it makes,
and those that are there before."""

_STEPS = 2  # the optimizer has its state from the first on
_MICRO_BATCHES = 2  # the second one meets the gradients of the first
_FAR = 1_000_000  # steps; no event comes as far


@dataclass(frozen=True, slots=True)
class StepMemory:
    """Bytes of tensors at the worst moment of a training step.

    Attributes:
        weights: What is frozen: the base model, buffers included.
        trained: Trainable parameters: the adapter at its largest budget, and the task head.
        optimizer: The optimizer's state.
        peak: All of this, and at that moment activations, gradients and temporaries.
    """

    weights: int
    trained: int
    optimizer: int
    peak: int

    @property
    def working(self) -> int:
        """Activations, gradients and temporaries."""
        return self.peak - self.weights - self.trained - self.optimizer


def run_trial(spec: RunSpec, job: Job, count: Count) -> StepMemory:
    """Train for two steps at the largest budget on rows as long as the longest, and count.

    A gradient sketch before an event, and the event itself, come on top.

    Args:
        spec: The run.
        job: Its data and model; the model is trained and of no use afterwards.
        count: Counts bytes.
    """
    with TemporaryDirectory() as folder:
        trial = _shorten(spec, folder)
        args = make_arguments(trial)
        rows = args.train_batch_size * args.gradient_accumulation_steps * _STEPS
        longest = Dataset.from_list([longest_row(job.splits["train"])] * rows)
        splits = DatasetDict({"train": longest})
        trainer = make_trainer(trial, replace(job, splits=splits), args, sinks=())
        trainer.add_callback(_Stop())

        def train() -> None:
            with suppress(_EnoughError):
                start_training(trainer)

        peak = count(train, _tensors(job.model))
        assert trainer.rankflow.flow is not None  # the steps are done
        trainer.rankflow.flow.close()
    trained = {p for p in job.model.parameters() if p.requires_grad}
    return StepMemory(
        weights=storage_bytes(t for t in _tensors(job.model) if t not in trained),
        trained=storage_bytes(trained),
        optimizer=storage_bytes(_state(trainer.optimizer)),
        peak=peak,
    )


def longest_row(rows: Dataset) -> dict[str, Any]:
    """Return a row that is as long in every column as the longest one there."""
    first = rows[0]
    return {
        name: max(rows[name], key=len) if isinstance(first[name], list) else first[name]
        for name in rows.column_names
    }


def _shorten(spec: RunSpec, folder: str) -> RunSpec:
    """Change what a trial does otherwise: it leaves no trace, and stays at the largest budget."""
    train = {
        "output_dir": folder,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "logging_first_step": False,
        "eval_strategy": "no",
        "eval_on_start": False,
        "save_strategy": "no",
        "load_best_model_at_end": False,
        "push_to_hub": False,
        "resume_from_checkpoint": None,
        "max_steps": 3 * _FAR,
        "gradient_accumulation_steps": min(
            spec.train.get("gradient_accumulation_steps", 1), _MICRO_BATCHES
        ),
        "dataloader_num_workers": 0,
    }
    far = {"warmup": _FAR, "every": _FAR, "cooldown": _FAR}
    budget = spec.budget.model_copy(update={"start": max(spec.budget.start, 1.0)} | far)
    return spec.model_copy(update={"train": spec.train | train, "budget": budget})


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    return chain(model.parameters(), model.buffers())


def _state(optimizer: Any) -> Iterable[Tensor]:
    states = optimizer.state.values()
    return (value for state in states for value in state.values() if isinstance(value, Tensor))


class _EnoughError(Exception):
    """Ends a training without what a Trainer and the engine do at a proper end."""


class _Stop(TrainerCallback):
    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop after two steps."""
        if state.global_step >= _STEPS:
            raise _EnoughError
