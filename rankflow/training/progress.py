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

from rankflow.integrations.huggingface import RankFlowCallback
from rankflow.records import RankEvent
from rankflow.report.summary import describe_event


class ProgressBar(TrainerCallback):
    """Shows steps, loss and time left, and prints a line above for each reallocation.

    Args:
        console: Where to draw.
        rankflow: The callback whose events are shown; it must come before this one.
    """

    def __init__(self, console: Console, rankflow: RankFlowCallback) -> None:
        self._rankflow = rankflow
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[loss]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=None, loss="")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Show the bar."""
        if state.is_world_process_zero and self._rankflow.flow is not None:
            self._rankflow.flow.sinks.append(self._print_event)
            self._progress.reset(self._task, total=state.max_steps, completed=state.global_step)
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
            self._progress.update(self._task, loss=f"loss {float(logs['loss']):.3f}")

    def close(self) -> None:
        """Leave the bar as it stands; also after an error, so that the terminal is usable."""
        self._progress.stop()

    def _print_event(self, event: RankEvent) -> None:
        self._progress.console.print(describe_event(event), highlight=False, soft_wrap=True)
