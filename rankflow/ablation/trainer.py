"""The Trainer of a cell: any method, with a learning rate of its own for the task head."""

import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.ablation.methods.method import Built
from rankflow.ablation.sizing import is_head
from rankflow.checkpoint import load_state
from rankflow.engine import RankFlow
from rankflow.integrations.huggingface import RankFlowCallback
from rankflow.training.pooling import TokenPooling
from rankflow.training.trainer import pooled_loss

_CHECKPOINT: Final = "checkpoint-"
_MARK: Final = "whole"


class StepClock(TrainerCallback):
    """Times the optimizer steps, reallocations included, reading of rows excluded.

    Attributes:
        wall: Seconds of all steps.
        cpu: Seconds of processor time of all steps, over all threads.
        steps: Number of steps.
    """

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self.steps = 0
        self._began: tuple[float, float] = (0.0, 0.0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Start the clock."""
        self._began = time.perf_counter(), time.process_time()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Stop it."""
        if args.device.type == "cuda":
            torch.cuda.synchronize(args.device)
        self.wall += time.perf_counter() - self._began[0]
        self.cpu += time.process_time() - self._began[1]
        self.steps += 1


class WholeMark(TrainerCallback):
    """Marks checkpoints that are complete: a kill leaves one that only looks so."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Mark the checkpoint that was just written."""
        (Path(args.output_dir) / f"{_CHECKPOINT}{state.global_step}" / _MARK).touch()


def last_whole_checkpoint(folder: Path, steps: int) -> str | None:
    """Return the newest complete checkpoint from which a step is left; None if none is there.

    From a checkpoint of its last step transformers' Trainer takes one step more than it should.

    Args:
        folder: Where the run keeps its checkpoints.
        steps: Optimizer steps of the whole run.
    """
    marks = folder.glob(f"{_CHECKPOINT}*/{_MARK}")
    taken = [int(mark.parent.name.removeprefix(_CHECKPOINT)) for mark in marks]
    last = max((step for step in taken if step < steps), default=None)
    return None if last is None else str(folder / f"{_CHECKPOINT}{last}")


class CellTrainer(Trainer):
    """A Trainer of what a method built.

    Args:
        built: The model, what happens while it trains, and its budget.
        head: Names of the modules of the task head, from the base model's root.
        head_rate: Learning rate of the head.
        pooling: How the logits of a text's tokens become one row; None for a model whose own loss
            counts.
        **arguments: What ``transformers.Trainer`` takes beyond the model.

    Attributes:
        steering: The callback that steers the ranks; None for methods without a budget.
        clock: Times the steps.
    """

    # The loss is the mean over a micro-batch, so the Trainer divides it by their number.
    loss_is_scaled_for_ga = False
    optimizer: Optimizer | None

    def __init__(
        self,
        *,
        built: Built,
        head: tuple[str, ...],
        head_rate: float,
        pooling: TokenPooling | None,
        **arguments: Any,
    ) -> None:
        super().__init__(model=built.model, **arguments)
        self._head = head
        self._head_rate = head_rate
        self._pooling: TokenPooling | None = pooling
        self.steering: RankFlowCallback | None = None
        if built.budget is not None:
            self.steering = RankFlowCallback(built.budget, sinks=(), follows_loads=True)
            self.add_callback(self.steering)
        for callback in built.callbacks:
            self.add_callback(callback)
        self.clock = StepClock()
        self.add_callback(self.clock)  # after those whose work it times
        self.add_callback(WholeMark())  # last: until then a checkpoint lacks something

    @property
    def flow(self) -> RankFlow | None:
        """The engine; None before training, and for methods without a budget."""
        return None if self.steering is None else self.steering.flow

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Give the head a learning rate of its own; nothing decays but by ``weight_decay``."""
        optimizer = self.optimizer
        if optimizer is None:
            groups: dict[bool, list[nn.Parameter]] = {False: [], True: []}
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    groups[is_head(name, self._head)].append(parameter)
            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            rates = {False: self.args.learning_rate, True: self._head_rate}
            optimizer = kind(
                [
                    {"params": p, "lr": rates[key], "weight_decay": self.args.weight_decay}
                    for key, p in groups.items()
                    if p
                ],
                **settings,
            )
        self.optimizer = optimizer
        return optimizer

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and the outputs if asked for."""
        if self._pooling is not None:
            return pooled_loss(model, inputs, self._pooling, return_outputs)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Bring a steered model to the checkpoint's ranks before its weights are loaded."""
        if self.steering is not None:
            state = load_state(resume_from_checkpoint)
            self.steering.start(self.model, state["total_steps"], resume=state)
        super()._load_from_checkpoint(resume_from_checkpoint, model)
