"""Scores that know nothing, against which the others have to prove themselves."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.importance.average import follow


class RandomScore:
    """A number in (0, 1] drawn once for each component, or magnitude, at its birth.

    Args:
        count: Number of them.
        seed: Seed of the draws; equal seeds give equal scores on every device.
        home: Device of the scores.
    """

    def __init__(self, count: int, seed: int, home: torch.device) -> None:
        self._home = home
        self._generator = torch.Generator().manual_seed(seed)
        self._values = _draw(count, self._generator).to(home)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Do nothing: the score is fixed."""

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        return self._values

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Keep the survivors' numbers and draw new ones for the newborns."""
        generator = torch.Generator()  # the one that it has stays as it is
        generator.set_state(self._generator.get_state())
        drawn = _draw(len(sources), generator).to(self._home)
        survives = (sources >= 0).to(self._home)
        self._values = torch.where(survives, follow(self._values, sources), drawn)
        self._generator = generator

    def state(self) -> dict[str, Tensor]:
        """Return the numbers and the generator's state."""
        return {"values": self._values, "generator": self._generator.get_state()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the numbers and the generator's state."""
        self._values = state["values"].to(self._home)
        self._generator.set_state(state["generator"].cpu())


class UniformScore:
    """One for every component.

    Args:
        sites: The sites whose components are scored.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Do nothing: the score is fixed."""

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        components = sum(site.rank for site in self._sites)
        return torch.ones(components, device=self._sites[0].A.device)

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Do nothing: there is no state."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""


def _draw(count: int, generator: torch.Generator) -> Tensor:
    return 1 - torch.rand(count, generator=generator)
