"""Count the steps in a row that were not finite, and stop a run that does not recover.

One such step is nothing: a gradient scaler makes some on purpose, and a batch may be broken. The
count lives on the device, and a copy of it is read when it has arrived, at the next step or later,
so that a healthy run never waits. A run in trouble does wait, and is looked at more closely: since
clipping spreads a single NaN over all gradients, these alone do not tell where it came from.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from rankflow.adapters.sites import Site
from rankflow.errors import DivergenceError, RankFlowError
from rankflow.importance.closer_look import CloserLook
from rankflow.importance.finite import Owned, name_sites
from rankflow.importance.gradients import Reading

MAX_BAD_STEPS: Final = 20
"""A gradient scaler that starts at 65536 comes down to 1 by 16 bad steps in a row."""

_REMEDY = (
    "lower the learning rate, train in bf16 instead of fp16, or look at the rows of that step; "
    "then go on from the last checkpoint"
)


def check_limit(max_bad_steps: int) -> None:
    """Check that a limit is a number of steps.

    Raises:
        RankFlowError: It is not.
    """
    if not isinstance(max_bad_steps, int) or max_bad_steps < 1:
        raise RankFlowError(
            f"max_bad_steps must be a positive whole number of steps, received {max_bad_steps!r}; "
            f"the default is {MAX_BAD_STEPS}"
        )


@dataclass(frozen=True, slots=True)
class _Step:
    """What is kept of a step until its count has arrived."""

    number: int
    loss: Tensor  # whether it was finite, ()
    reading: Reading


class BadSteps:
    """Counts the bad steps in a row, and raises where they are too many.

    Args:
        sites: The sites.
        limit: How many stop the run.
    """

    def __init__(self, sites: Sequence[Site], limit: int) -> None:
        self._sites = tuple(sites)
        self._home = sites[0].A.device
        self._limit = limit
        self._look: CloserLook | None = None
        self.restart(0)

    def restart(self, in_a_row: int) -> None:
        """Go on from that many bad steps in a row."""
        self._known = in_a_row
        self._count = torch.tensor(in_a_row, device=self._home)
        self._arriving: tuple[_Step, _Arrival] | None = None
        self._first: _Step | None = None
        self.close()

    def close(self) -> None:
        """Remove the hooks."""
        if self._look is not None:
            self._look.close()
            self._look = None

    @property
    def in_a_row(self) -> int:
        """Bad steps in a row up to now; waits for the device."""
        return int(self._count)

    def count(self, number: int, reading: Reading, loss: Tensor, trained: Sequence[Owned]) -> None:
        """Count a step, and look at what has arrived of the steps before.

        Args:
            number: The step's number, from 1.
            reading: What its gradients say.
            loss: Whether its loss was finite, a boolean of shape ``()``.
            trained: The parameters that it trains.

        Raises:
            DivergenceError: As many steps in a row were bad as stop the run.
        """
        self._count = torch.where(reading.accept & loss, 0, self._count + 1)
        self._look_at_arrival(wait=False)
        if self._arriving is None:
            self._arriving = (_Step(number, loss, reading), _Arrival(self._count))
            self._look_at_arrival(wait=self._known > 0)
        if self._look is not None:  # it has seen one whole step
            self._look.close()
        elif self._known > 0:
            self._look = CloserLook(self._sites, trained)

    def _look_at_arrival(self, *, wait: bool) -> None:
        if self._arriving is None:
            return
        step, arrival = self._arriving
        if not (wait or arrival.is_there()):
            return
        self._arriving = None
        self._known = arrival.read()
        if self._known == 0:
            self._first = None
            self.close()
            return
        if self._first is None:
            self._first = step
        if self._known >= self._limit:
            message = self._tell(self._first, step.number)
            self.close()
            raise DivergenceError(message)

    def _tell(self, seen: _Step, last: int) -> str:
        first = last - self._known + 1
        of_loss = not seen.loss
        found = "" if self._look is None else self._look.tell()
        return (
            f"{self._known} steps in a row had {'a loss' if of_loss else 'gradients'} that "
            f"{'is' if of_loss else 'are'} not finite, the first is step {first}: "
            f"{_where(seen.reading)}{'; looked at closely, ' if found else ''}{found}; {_REMEDY}"
        )


def _where(reading: Reading) -> str:
    finite = reading.finite.tolist()
    bad = [owner for owner, is_finite in zip(reading.owners, finite, strict=True) if not is_finite]
    if not bad:
        return "each gradient was finite, and their norm overflowed, or the loss was not"
    if len(bad) == len(finite):
        return "no gradient was finite"
    return f"the gradients of {name_sites(bad)} were not finite"


class _Arrival:
    """A number on its way from the device."""

    def __init__(self, number: Tensor) -> None:
        self._host = number
        self._event: torch.Event | None = None
        if number.device.type != "cpu":
            self._host = torch.empty_like(number, device="cpu", pin_memory=True)
            self._host.copy_(number, non_blocking=True)
            self._event = torch.Event(device=number.device)
            self._event.record()

    def is_there(self) -> bool:
        return self._event is None or self._event.query()

    def read(self) -> int:
        """Return it, once it is there."""
        if self._event is not None:
            self._event.synchronize()
        return int(self._host)
