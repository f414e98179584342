"""What the engine may report to."""

from typing import Protocol

from rankflow.records import RankEvent


class EventSink(Protocol):
    """Anything that takes an event: a function, an ``EventLog``, a ``TensorBoardSink``.

    A sink that holds a file open also has a ``close()``; who made it calls that.
    """

    def __call__(self, event: RankEvent) -> None:
        """Take one event, in the order in which the events happen."""
