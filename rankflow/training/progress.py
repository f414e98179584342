"""The progress bar of a run, and the lines above it."""

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow.records import RankEvent
from rankflow.report.summary import describe_event


class ProgressBar(TrainerCallback):
    """Shows steps, loss and time left; as a sink of events, prints a line for each above the bar.

    Args:
        console: Where to draw.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, loss="", start=False)

    def __call__(self, event: RankEvent) -> None:
        """Print what an event did."""
        self._progress.console.print(describe_event(event), highlight=False)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero:
            self._progress.update(self._task, total=state.max_steps)
            self._progress.start_task(self._task)
            self._progress.start()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Show the loss beside the bar."""
        if logs and "loss" in logs:
            self._progress.update(self._task, loss=f"loss {logs['loss']:.3f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Leave the finished bar standing."""
        self._progress.stop()
