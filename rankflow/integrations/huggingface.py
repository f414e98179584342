"""RankFlow in transformers' Trainer: a callback for any Trainer, and a thin Trainer.

The order of a Trainer's step decides where each half belongs: gradients are complete and clipped at
``on_pre_optimizer_step``, and at ``on_step_end`` the update is done, so that no gradient scaler
stands between ``unscale_`` and ``step``.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.checkpoint import check_resumable, checkpoint_name, load_state, save_state
from rankflow.durable import claim, is_failed_write, seal
from rankflow.engine import RankFlow
from rankflow.errors import CheckpointError, DivergenceError, RankFlowError
from rankflow.importance.bad_steps import MAX_BAD_STEPS
from rankflow.integrations.durable_trainer import (
    DurableTrainer,
    newest_checkpoint,
    tell_failure,
)
from rankflow.integrations.refusals import (
    check_engine,
    check_fresh,
    check_plain,
    refuse_other_ranks,
)
from rankflow.integrations.reporters import Reporters
from rankflow.records import RankEvent
from rankflow.report.events import EVENTS_FILE, EventLog
from rankflow.report.tensorboard import TensorBoardSink
from rankflow.specs.budget import BudgetSpec

logger = logging.getLogger(__name__)

Sink = Callable[[RankEvent], None]


class RankFlowCallback(TrainerCallback):
    """Steers the ranks of the model that a Trainer trains.

    Works with any Trainer that trains a ``PeftModel`` with a LoRA or DoRA adapter, TRL's too. To
    resume a run, or to load the best model at its end, ranks must change before weights are
    loaded. ``RankFlowTrainer`` does so by itself; under another Trainer ``resume`` does, which also
    tells what else is lacking, and loading the best model is refused.

    Args:
        budget: The budget, from ``load_budget``.
        adapter_name: The adapter to steer.
        sinks: Called with every event; None writes ``events.jsonl`` into the output folder, and
            scalars and heatmaps beside it if the Trainer reports to TensorBoard. See also
            ``log_to``.
        max_bad_steps: As in ``RankFlow``. A step that is not finite is muted: it leaves the weights
            as the optimizer leaves them without a gradient.
        keeps_checkpoints: Whether the Trainer writes the engine's state into its checkpoints and
            reads it from them, as ``RankFlowTrainer`` does.

    Attributes:
        flow: The engine, once training has begun.
    """

    def __init__(
        self,
        budget: BudgetSpec,
        adapter_name: str = "default",
        *,
        sinks: Sequence[Sink] | None = None,
        max_bad_steps: int = MAX_BAD_STEPS,
        keeps_checkpoints: bool = False,
    ) -> None:
        self.budget = budget
        self.adapter_name = adapter_name
        self.flow: RankFlow | None = None
        self._sinks = sinks
        self._max_bad_steps = max_bad_steps
        self._loss: Tensor | None = None
        self._trainer: Trainer | None = None
        self._keeps_checkpoints = keeps_checkpoints
        self._guard: RemovableHandle | None = None
        self._claim = ExitStack()

    def start(self, model: nn.Module, total_steps: int, resume: dict[str, Any] | None) -> RankFlow:
        """Attach the engine to a model; ``on_train_begin`` does so if nobody has.

        Args:
            model: The ``PeftModel``.
            total_steps: Optimizer steps of the whole run.
            resume: The state of the engine in the run that goes on, or None.
        """
        self.flow = RankFlow(
            model,
            self.budget,
            total_steps,
            self.adapter_name,
            resume=resume,
            max_bad_steps=self._max_bad_steps,
        )
        return self.flow

    def note_loss(self, loss: Tensor) -> None:
        """Let the loss of a micro-batch count too; ``RankFlowTrainer`` does so itself.

        Args:
            loss: The loss, detached.
        """
        self._loss = loss if self._loss is None else self._loss + loss

    def resume(self, trainer: Trainer, checkpoint: str | Path | None = None) -> str:
        """Bring the model of a plain Trainer to the ranks of a checkpoint, and return its path.

        ``trainer.train(resume_from_checkpoint=callback.resume(trainer))`` then goes on, with
        the events, parameters, optimizer state and rates of a run without interruption.
        What ``RankFlowTrainer`` has and a plain Trainer has not: checkpoints are written in place,
        so a crash while saving leaves a folder that is skipped here; with ``save_total_limit`` the
        older ones are removed before the new one is sealed; the first loss that is logged
        afterwards is the mean of fewer steps.

        Args:
            trainer: The Trainer that has this callback.
            checkpoint: The checkpoint; None for the newest in its output folder that verifies.

        Raises:
            CheckpointError: It is damaged, none verifies, or the run had come to its end.
        """
        if checkpoint is None:
            checkpoint = newest_checkpoint(Path(trainer.args.output_dir))
        else:
            check_resumable(checkpoint)
        state = load_state(checkpoint)
        if state["steps"] >= state["total_steps"]:
            raise CheckpointError(
                f"{checkpoint} is of the last of {state['total_steps']} steps, so nothing is left "
                "to train; load it with peft.PeftModel.from_pretrained"
            )
        self.start(extract_model_from_parallel(trainer.model), state["total_steps"], resume=state)
        return str(checkpoint)

    def log_to(self, trainer: Trainer) -> None:
        """Show the numbers of every event to all that a Trainer reports to, such as W&B or MLflow.

        A callback does not know its Trainer, so call it once before training; ``RankFlowTrainer``
        does so itself. Sinks of your own take the place of this too.

        Args:
            trainer: The Trainer that has this callback.
        """
        self._trainer = trainer

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **_: Any,
    ) -> None:
        """Refuse, from now until training begins, to load weights of other ranks."""
        self._guard = model.register_load_state_dict_pre_hook(refuse_other_ranks)

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
        if self._guard is not None:
            self._guard.remove()
        check_engine(args)
        flow = self.flow
        is_new = flow is None or flow.steps != state.global_step
        if not self._keeps_checkpoints:
            check_plain(args, state, is_new)
            if state.is_world_process_zero:
                self._claim.enter_context(claim(Path(args.output_dir)))
        if flow is None or is_new:
            check_fresh(optimizer)
            flow = self.start(extract_model_from_parallel(model), state.max_steps, None)
        if flow.total_steps != state.max_steps:
            raise CheckpointError(
                f"the resumed run was planned for {flow.total_steps} steps and this one takes "
                f"{state.max_steps}; the schedule depends on it: keep the length of the run"
            )
        flow.attach(optimizer)
        if state.is_world_process_zero:
            flow.sinks = self._default_sinks(args) if self._sinks is None else list(self._sinks)

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Fold the step's gradients into the scores, and add the budget's regulariser to them.

        A step that is not finite is muted, unless a gradient scaler skips it.
        """
        flow = self._running()
        loss, self._loss = self._loss, None
        with self._closed_on_divergence():
            flow.observe(loss_scale=_loss_scale(optimizer), loss=loss)
        if not _is_scaled(optimizer):
            flow.mute_bad_step()
        flow.regularise()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        """Count the step, reallocate if an event is due, and have only finite weights saved."""
        with self._closed_on_divergence():
            self._running().step(optimizer)
            if control.should_save:
                self._running().check_finite()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have only finite weights saved."""
        if control.should_save:
            with self._closed_on_divergence():
                self._running().check_finite()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Add the engine's state to the checkpoint that was just written, and seal it.

        One whose weights are not finite stays without, so that no run goes on from it.
        """
        if self._keeps_checkpoints:
            return
        with self._closed_on_divergence():
            self._running().check_finite()
        state_dict = self._running().state_dict()
        PartialState().wait_for_everyone()  # until all have written their parts
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / checkpoint_name(state.global_step)
        try:
            save_state(state_dict, folder)
            seal(folder)
        except Exception as error:
            if not is_failed_write(error):
                raise
            raise tell_failure(folder, error) from error

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Meet the target budget if the run ended above it, and close what was opened."""
        flow = self._running()
        flow.sinks = [sink for sink in flow.sinks if not isinstance(sink, Reporters)]  # have ended
        try:
            event = flow.finish()
        finally:
            self._close(flow)
        if event is not None:
            logger.warning(
                "after %d of %d steps the model was above its budget; %d components were pruned to "
                "meet its %d parameters: train to the end, or plan for fewer steps",
                flow.steps,
                flow.total_steps,
                len(event.pruned),
                event.limit,
            )

    @contextmanager
    def _closed_on_divergence(self) -> Iterator[None]:
        try:
            yield
        except DivergenceError:
            self._close(self._running())
            raise

    def _close(self, flow: RankFlow) -> None:
        if self._sinks is None:
            for sink in flow.sinks:
                if isinstance(sink, TensorBoardSink):
                    sink.close()
        flow.close()
        self._claim.close()

    def _default_sinks(self, args: TrainingArguments) -> list[Sink]:
        folder = Path(args.output_dir)
        flow = self._running()
        log = EventLog(folder / EVENTS_FILE, keep=0)
        for event in flow.history:  # the run that is resumed may have had another folder
            log(event)
        sinks: list[Sink] = [log]
        if "tensorboard" in args.report_to:
            purge_step = flow.steps + 1 if flow.steps else None
            sinks.append(TensorBoardSink(folder / "rankflow", purge_step=purge_step))
        if self._trainer is not None:
            sinks.append(Reporters(self._trainer))
        return sinks

    def _running(self) -> RankFlow:
        if self.flow is None:
            raise RankFlowError(
                "training began without RankFlowCallback.on_train_begin; pass the callback to the "
                "Trainer before train() is called"
            )
        return self.flow


class RankFlowTrainer(DurableTrainer):
    """A Trainer under a budget whose runs resume bit for bit, across changed ranks too.

    Args:
        budget: The budget, from ``load_budget``.
        adapter_name: The adapter to steer.
        sinks: As in ``RankFlowCallback``.
        max_bad_steps: As in ``RankFlowCallback``; losses that are not finite count too.
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
        max_bad_steps: int = MAX_BAD_STEPS,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self.rankflow = RankFlowCallback(
            budget, adapter_name, sinks=sinks, max_bad_steps=max_bad_steps, keeps_checkpoints=True
        )
        self.rankflow.log_to(self)
        self.add_callback(self.rankflow)

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor | Any],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Train on a micro-batch, and let its loss tell whether the step is finite."""
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self.rankflow.note_loss(loss)
        return loss

    def save_engine(self, folder: Path) -> None:
        """Write the engine's state into a checkpoint, unless its weights are not finite."""
        flow = self.rankflow.flow
        assert flow is not None  # checkpoints are written while it trains
        flow.check_finite()
        state = flow.state_dict()
        if self.args.should_save:
            save_state(state, folder)

    def load_engine(self, folder: Path, *, resumes: bool) -> None:
        """Bring the model to the ranks of a checkpoint, before its weights are loaded."""
        state = load_state(folder)
        flow = self.rankflow.flow
        if resumes or flow is None:
            self.rankflow.start(self.model, state["total_steps"], resume=state)
            return
        history = flow.history
        flow.load_state_dict(state)
        flow.history = history  # it tells what happened, not what led to the best model


def _is_scaled(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, AcceleratedOptimizer) and optimizer.scaler is not None


def _loss_scale(optimizer: Optimizer) -> Tensor | float:
    """Return the factor that fp16 training put on the loss, left on its device."""
    scaler = optimizer.scaler if isinstance(optimizer, AcceleratedOptimizer) else None
    scale = None if scaler is None else scaler._scale  # get_scale() would wait for the device
    return 1.0 if scale is None else scale
