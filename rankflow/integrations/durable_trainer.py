"""A Trainer whose checkpoints are whole or not there, and whose runs resume bit for bit."""

import logging
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import nn
from transformers import Trainer, TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy, TrainOutput, rotate_checkpoints

from rankflow.checkpoint import (
    CHECKPOINT,
    check_resumable,
    check_whole,
    checkpoint_name,
    find_checkpoint,
)
from rankflow.durable import claim, is_failed_write, new_folder, sweep, temporary_folder
from rankflow.errors import CheckpointError, brief

logger = logging.getLogger(__name__)

_LOSS: Final = "RankFlowLoss"


class DurableTrainer(Trainer, ABC):
    """A Trainer that saves by ``rankflow.durable`` and resumes only from what verifies.

    transformers writes checkpoints in place, takes the highest number for the newest, and goes on
    without a file that is missing. Here a checkpoint appears under its name when it is whole and on
    disk, older ones are removed only then, and what is loaded is what was written. One process at a
    time, or one job of several, writes a folder.
    """

    @abstractmethod
    def save_engine(self, folder: Path) -> None:
        """Write the state of the engine that steers the ranks, if there is one.

        All processes of a job call it, and those whose ``args.should_save`` is set write.
        """

    @abstractmethod
    def load_engine(self, folder: Path, *, resumes: bool) -> None:
        """Bring the model to the ranks of a checkpoint, before its weights are loaded.

        Args:
            folder: The checkpoint.
            resumes: Whether a run goes on from it; else it is the best model of one that ends.
        """

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train, as ``Trainer.train`` does.

        Args:
            resume_from_checkpoint: A checkpoint, or True for the newest one that verifies.
            trial: As in ``Trainer.train``.
            ignore_keys_for_eval: As in ``Trainer.train``.

        Raises:
            CheckpointError: The checkpoint is damaged, or none verifies.
            RankFlowError: Another process is writing to the output folder.
        """
        folder = Path(self.args.output_dir)
        with claim(folder) if self.is_world_process_zero() else nullcontext():
            if self.is_world_process_zero():
                sweep(folder, f"{CHECKPOINT}*")
            if resume_from_checkpoint is True:
                resume_from_checkpoint = str(newest_checkpoint(folder))
            elif resume_from_checkpoint:
                check_resumable(resume_from_checkpoint)
            if resume_from_checkpoint:
                _compare_processes(Path(resume_from_checkpoint), self.args.world_size)
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint, then remove those that ``save_total_limit`` does not keep."""
        if self.hp_search_backend is None and trial is None:
            self.store_flos()
        run = Path(self._get_output_dir(trial))
        folder = run / checkpoint_name(self.state.global_step)
        self._note_best(run)
        try:
            self._write_checkpoint(folder)
        except Exception as error:
            if not is_failed_write(error):
                raise
            raise tell_failure(folder, error) from error
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _note_best(self, run: Path) -> None:
        """Note the best checkpoint if it is there, or about to be written."""
        best = self.state.best_global_step
        strategies = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
        if not best or self.args.save_strategy not in strategies:
            return
        folder = run / checkpoint_name(best)
        if best == self.state.global_step or folder.is_dir():
            self.state.best_model_checkpoint = str(folder)

    def _write_checkpoint(self, folder: Path) -> None:
        wait = self.accelerator.wait_for_everyone
        makes = self.args.should_save
        with new_folder(folder) if makes else nullcontext(temporary_folder(folder)) as temporary:
            wait()  # until it is there
            self.save_model(str(temporary), _internal_call=True)
            if not self.args.save_only_model:
                self._save_optimizer_and_scheduler(str(temporary))
                self._save_scaler(str(temporary))
                self._save_rng_state(str(temporary))
            if makes:
                self._save_progress(temporary)
            self.save_engine(temporary)
            wait()  # until all have written their parts
        wait()  # until it has its name

    def _save_progress(self, folder: Path) -> None:
        parts = [*self.callback_handler.callbacks, self.control]
        exported = TrainerState(
            stateful_callbacks=[part for part in parts if isinstance(part, ExportableState)]
        )
        loss = {"sum": self._tr_loss.item(), "logged": self._globalstep_last_logged}
        state = replace(self.state, stateful_callbacks=exported.stateful_callbacks | {_LOSS: loss})
        state.save_to_json(str(folder / "trainer_state.json"))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        """Bring the model to the checkpoint's ranks before its weights are loaded."""
        self.load_engine(Path(resume_from_checkpoint), resumes=True)
        super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        """Bring the model to the best checkpoint's ranks before its weights are loaded."""
        check_whole(self.state.best_model_checkpoint)
        self.load_engine(Path(self.state.best_model_checkpoint), resumes=False)
        super()._load_best_model()

    def _run_epoch(self, **arguments: Any) -> None:
        """Run an epoch; a run that was saved at its last step takes no other one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        carried = self.state.stateful_callbacks.pop(_LOSS, None)
        if carried is not None:  # what the first logged loss is a mean of began before the resume
            self._tr_loss += carried["sum"]
            self._total_loss_scalar -= carried["sum"]
            self._globalstep_last_logged = carried["logged"]
        super()._run_epoch(**arguments)


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a run that verifies, and warn of those that it skips.

    Args:
        folder: The run's output folder.

    Raises:
        CheckpointError: There is none.
    """
    found = find_checkpoint(folder)
    for skipped in found.skipped:
        logger.warning("skipped %s: %s", skipped.path, skipped.reason)
    if found.path is None:
        raise CheckpointError(
            f"{folder} holds no checkpoint that a run can go on from; begin anew, and save: "
            "save_strategy must not be 'no'"
        )
    return found.path


def _compare_processes(checkpoint: Path, count: int) -> None:
    """Warn if a job of another number of processes wrote a checkpoint."""
    before = max(1, len(list(checkpoint.glob("rng_state_*.pth"))))
    if before != count:
        logger.warning(
            "%s was written by a job of %d processes and this one has %d: it goes on, but other "
            "random numbers and other batches make it another run",
            checkpoint,
            before,
            count,
        )


def tell_failure(folder: Path, error: Exception) -> CheckpointError:
    """Say that a checkpoint could not be written, and which older one is whole."""
    older = find_checkpoint(folder.parent).path
    remains = "there is no older one" if older is None else f"{older} is whole"
    return CheckpointError(
        f"{folder} could not be written ({brief(error)}); {remains}: free some space, and resume"
    )
