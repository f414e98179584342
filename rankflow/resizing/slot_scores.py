r"""Scores of components whose rows are spread over processes.

Under FSDP2 a row of A lies in one process, and with it all that its score needs: the gate gradient
:math:`T_i = \langle a_i, \partial L / \partial a_i \rangle` is complete there. So each process
keeps the averages of its own slots, and nothing is exchanged until an event asks for the scores.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch import Tensor

from rankflow import processes
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import Slots
from rankflow.importance.scorer import Scorer


class SlotScores:
    """A scorer in the order of the table, made of one that sees this process's slots.

    Args:
        inner: Scores the slots of this process, live or not.
        sites: The sites.
    """

    def __init__(self, inner: Scorer, sites: Sequence[Site]) -> None:
        self._inner = inner
        self._slots = slots_of(sites)
        self._home = sites[0].A.device
        firsts = first_slots(self._slots)
        here = [f + slot for f, s in zip(firsts, self._slots, strict=True) for slot in s.here]
        self._here = torch.tensor(here, dtype=torch.long, device=self._home)
        self._all: Tensor | None = None

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one step's gradients; a process decides about its own rows alone."""
        self._inner.observe(unclip, accept)

    def share(self) -> Tensor:
        """Return the scores of this process's slots, shape ``(slots,)``, 0 at all others."""
        return self._spread(self._inner.read())

    def receive(self, scores: Tensor) -> None:
        """Take the sum of what ``share`` returned in all processes."""
        self._all = scores

    def read(self) -> Tensor:
        """Return the scores that were received last, shape ``(C,)``."""
        assert self._all is not None, "scores are exchanged before they are read"
        return self._all[table_order(self._slots, self._home)]

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Let the newborns' slots, and those without a component, start afresh."""
        survives = torch.zeros(count_slots(self._slots), dtype=torch.bool, device=self._home)
        survives[table_order(self._slots, self._home)] = (sources >= 0).to(self._home)
        places = torch.arange(len(self._here), device=self._home)
        inner = copy(self._inner)  # the one that it has stays as it is
        inner.reindex(sites, torch.where(survives[self._here], places, -1), before)
        self._inner, self._all = inner, None

    def state(self) -> dict[str, Tensor]:
        """Return the averages of all components; all processes have to call it."""
        order = table_order(self._slots, self._home)
        whole = {}
        for key, value in self._inner.state().items():
            whole[key] = self._spread(value)
            processes.add_up(whole[key], "bringing scores together")
            whole[key] = whole[key][order]
        return whole

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the averages of the components that are here."""
        order = table_order(self._slots, self._home)
        own = {}
        for key, value in state.items():
            spread = torch.zeros(count_slots(self._slots), device=self._home)
            spread[order] = value.to(spread)
            own[key] = spread[self._here]
        self._inner.load(own)

    def _spread(self, values: Tensor) -> Tensor:
        spread = torch.zeros(count_slots(self._slots), device=self._home)
        spread[self._here] = values.to(spread)
        return spread


def slots_of(sites: Sequence[Site]) -> tuple[Slots, ...]:
    """Return the slots of sites that have them."""
    found = tuple(site.slots for site in sites if site.slots is not None)
    assert len(found) == len(sites), "a site's tensors are resized"
    return found


def count_slots(slots: Sequence[Slots]) -> int:
    """Slots of all sites."""
    return sum(s.capacity for s in slots)


def first_slots(slots: Sequence[Slots]) -> list[int]:
    """Return where the slots of each site begin among those of all."""
    firsts, total = [], 0
    for s in slots:
        firsts.append(total)
        total += s.capacity
    return firsts


def table_order(slots: Sequence[Slots], home: torch.device) -> Tensor:
    """Return the place of every component, in the order of the table, among the slots of all."""
    places = [f + slot for f, s in zip(first_slots(slots), slots, strict=True) for slot in s.live]
    return torch.tensor(places, dtype=torch.long, device=home)
