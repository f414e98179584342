"""RankFlow in transformers' Trainer: a callback for any Trainer, and a thin Trainer.

The order of a Trainer's step decides where each half belongs: gradients are complete and clipped at
``on_pre_optimizer_step``, and at ``on_step_end`` the update is done, so that no gradient scaler
stands between ``unscale_`` and ``step``.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.checkpoint import load_state, save_state
from rankflow.engine import RankFlow
from rankflow.errors import CheckpointError, RankFlowError
from rankflow.records import RankEvent
from rankflow.report.events import EventLog
from rankflow.report.tensorboard import TensorBoardSink
from rankflow.specs.budget import BudgetSpec

logger = logging.getLogger(__name__)

Sink = Callable[[RankEvent], None]


class RankFlowCallback(TrainerCallback):
    """Steers the ranks of the model that a Trainer trains.

    Works with any Trainer that trains a ``PeftModel`` with a LoRA or DoRA adapter, TRL's too.

    Args:
        budget: The budget, from ``load_budget``.
        adapter_name: The adapter to steer.
        sinks: Called with every event; None writes ``events.jsonl`` into the output folder, and
            scalars and heatmaps beside it if the Trainer reports to TensorBoard.

    Attributes:
        flow: The engine, once training has begun.
    """

    def __init__(
        self,
        budget: BudgetSpec,
        adapter_name: str = "default",
        *,
        sinks: Sequence[Sink] | None = None,
    ) -> None:
        self.budget = budget
        self.adapter_name = adapter_name
        self.flow: RankFlow | None = None
        self._sinks = sinks

    def start(self, model: nn.Module, total_steps: int, resume: dict[str, Any] | None) -> RankFlow:
        """Attach the engine to a model; ``on_train_begin`` does so if nobody has.

        Args:
            model: The ``PeftModel``.
            total_steps: Optimizer steps of the whole run.
            resume: The state of the engine in the run that goes on, or None.
        """
        self.flow = RankFlow(model, self.budget, total_steps, self.adapter_name, resume=resume)
        return self.flow

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Attach the engine, resize to the start budget or to the resumed ranks, open the sinks."""
        flow = self.flow
        if flow is None or flow.steps != state.global_step:
            resume = _resumed_state(args, state) if state.global_step > 0 else None
            flow = self.start(extract_model_from_parallel(model), state.max_steps, resume)
        if flow.total_steps != state.max_steps:
            raise CheckpointError(
                f"the resumed run was planned for {flow.total_steps} steps and this one takes "
                f"{state.max_steps}; the schedule depends on it: keep the length of the run"
            )
        flow.attach(optimizer)
        if state.is_world_process_zero:
            flow.sinks = _default_sinks(args, flow) if self._sinks is None else list(self._sinks)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Fold the step's gradients into the scores."""
        self._running().observe(loss_scale=_loss_scale(optimizer))

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Count the step, and reallocate if an event is due."""
        self._running().step(optimizer)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the engine's state to the checkpoint that was just written."""
        if state.is_world_process_zero:
            save_state(self._running().state_dict(), _checkpoint_folder(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Meet the target budget if the run ended above it, and close what was opened."""
        flow = self._running()
        event = flow.finish()
        if event is not None:
            logger.warning(
                "training ended after %d of %d steps above the budget; %d components were pruned "
                "to meet its %d parameters: train to the end, or plan for fewer steps",
                state.global_step,
                flow.total_steps,
                len(event.pruned),
                event.limit,
            )
        if self._sinks is None:
            for sink in flow.sinks:
                if isinstance(sink, EventLog | TensorBoardSink):
                    sink.close()
        flow.close()

    def _running(self) -> RankFlow:
        if self.flow is None:
            raise RankFlowError(
                "training began without RankFlowCallback.on_train_begin; pass the callback to the "
                "Trainer before train() is called"
            )
        return self.flow


class RankFlowTrainer(Trainer):
    """A Trainer under a budget that can also resume and load the best model across resizes.

    Args:
        budget: The budget, from ``load_budget``.
        adapter_name: The adapter to steer.
        sinks: As in ``RankFlowCallback``.
        **arguments: Everything that ``transformers.Trainer`` takes.

    Attributes:
        rankflow: The callback; its ``flow`` is the engine.
    """

    def __init__(
        self,
        *,
        budget: BudgetSpec,
        adapter_name: str = "default",
        sinks: Sequence[Sink] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.rankflow = RankFlowCallback(budget, adapter_name, sinks=sinks)
        self.add_callback(self.rankflow)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Bring the model to the checkpoint's ranks before its weights are loaded."""
        state = load_state(resume_from_checkpoint)
        self.rankflow.start(self.model, state["total_steps"], resume=state)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Bring the model to the best checkpoint's ranks before its weights are loaded."""
        if self.rankflow.flow is not None:
            self.rankflow.flow.load_state_dict(load_state(self.state.best_model_checkpoint))
        super()._load_best_model()


def _default_sinks(args: TrainingArguments, flow: RankFlow) -> list[Sink]:
    folder = Path(args.output_dir)
    sinks: list[Sink] = [EventLog(folder / "events.jsonl", keep=len(flow.history))]
    if "tensorboard" in args.report_to:
        sinks.append(TensorBoardSink(folder / "rankflow"))
    return sinks


def _checkpoint_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _resumed_state(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    return load_state(_checkpoint_folder(args, state))


def _loss_scale(optimizer: Optimizer) -> Tensor | float:
    """Return the factor that fp16 training put on the loss, left on its device."""
    scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
    scale = None if scaler is None else scaler._scale  # get_scale() would wait for the device
    return 1.0 if scale is None else scale
