"""SIGTERM and SIGINT: save a checkpoint at the end of the step, and exit.

The exit code is 128 plus the signal's number, as shells have it: 143 for SIGTERM, 130 for SIGINT
(Ctrl-C). A second signal, and one outside of training, where there is nothing to save, ends the
process at once.

In a job of several processes all ask each other after every step whether a signal came, since all
have to save the same step: one small message between hosts, which loops of one's own do not have.
"""

import signal
import threading
from types import FrameType
from typing import Any, Self

from rich.console import Console
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rankflow import processes

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals(TrainerCallback):
    """Ends a run on a signal; a context manager that handles them while its block runs.

    Args:
        console: Where to tell.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._received: signal.Signals | None = None
        self._is_training = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Handle signals from now on; outside of the main thread Python does not allow it."""
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        """Handle them as before."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let signals wait for the end of a step."""
        self._is_training = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint if a signal came, to whichever process of a job."""
        received = max(processes.gather(self._received or 0, "stopping on a signal"))
        if received:
            self._received = signal.Signals(received)
            control.should_save = True

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Exit if a signal came; the checkpoint is on disk."""
        if self._received is not None:
            self._console.print(
                f"{self._received.name}: saved after step {state.global_step} of "
                f"{state.max_steps} in {args.output_dir}; go on with the same command and "
                "--resume",
                highlight=False,
                soft_wrap=True,
            )
            raise SystemExit(128 + self._received)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Let signals end the process at once again."""
        self._is_training = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None or not self._is_training:
            raise SystemExit(128 + number)
        self._received = signal.Signals(number)
