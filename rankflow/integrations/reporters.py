"""The numbers of events for whatever a Trainer reports to: W&B, MLflow, or a callback of one's own.

They go to the callbacks as a log entry of their step, and not through the Trainer's ``log``, which
does more than that: it appends to ``log_history``, and TRL's also averages and forgets its metrics.
"""

from copy import copy

from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.integrations import TensorBoardCallback

from rankflow.records import RankEvent
from rankflow.report.scalars import event_scalars


class Reporters:
    """A sink that shows each event's numbers to a Trainer's callbacks.

    Left out are those that write to the terminal and, where the Trainer reports to TensorBoard,
    that one: it gets the events from ``TensorBoardSink``.

    Args:
        trainer: The Trainer.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def __call__(self, event: RankEvent) -> None:
        """Show the event's numbers."""
        trainer = self._trainer
        served = [ProgressCallback, PrinterCallback]
        if "tensorboard" in trainer.args.report_to:
            served.append(TensorBoardCallback)
        handler = copy(trainer.callback_handler)
        handler.callbacks = [c for c in handler.callbacks if not isinstance(c, tuple(served))]
        is_due = trainer.control.should_log
        handler.on_log(trainer.args, trainer.state, trainer.control, logs=event_scalars(event))
        trainer.control.should_log = is_due  # the step's loss is still to be logged
