"""The Trainer of a cell: any method, with a learning rate of its own for the task head."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.ablation.methods.method import Built
from rankflow.ablation.sizing import is_head
from rankflow.checkpoint import load_state, save_state
from rankflow.engine import RankFlow
from rankflow.integrations.durable_trainer import DurableTrainer
from rankflow.integrations.huggingface import RankFlowCallback
from rankflow.training.pooling import TokenPooling
from rankflow.training.trainer import pooled_loss


class StepClock(TrainerCallback):
    """Times the optimizer steps, reallocations included, reading of rows excluded.

    Attributes:
        steps: Number of steps.
    """

    def __init__(self) -> None:
        self._wall = self._cpu = 0.0
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
        self._wall += time.perf_counter() - self._began[0]
        self._cpu += time.process_time() - self._began[1]
        self.steps += 1

    @property
    def mean_wall(self) -> float | None:
        """Seconds of a step; None if there was none, as in a run that was resumed at its end."""
        return self._wall / self.steps if self.steps else None

    @property
    def mean_cpu(self) -> float | None:
        """Seconds of processor time of a step, over all threads; None as above."""
        return self._cpu / self.steps if self.steps else None


class CellTrainer(DurableTrainer):
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
            self.steering = RankFlowCallback(built.budget, sinks=(), keeps_checkpoints=True)
            self.add_callback(self.steering)
        for callback in built.callbacks:
            self.add_callback(callback)
        self.clock = StepClock()
        self.add_callback(self.clock)  # after those whose work it times

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

    def save_engine(self, folder: Path) -> None:
        """Write the state of the engine that steers the ranks, if there is one."""
        if self.flow is not None:  # a cell has one process
            save_state(self.flow.state_dict(), folder)

    def load_engine(self, folder: Path, *, resumes: bool) -> None:
        """Bring a steered model to the checkpoint's ranks before its weights are loaded."""
        if self.steering is not None:
            state = load_state(folder)
            self.steering.start(self.model, state["total_steps"], resume=state)
