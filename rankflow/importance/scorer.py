"""What a scorer is, and the scorers by name."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site


class Scorer(Protocol):
    """Tracks what every component is worth; components are in table order (``records``).

    State lives on the sites' device, and ``observe`` never waits for it.
    """

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one optimizer step's gradients (or weights).

        Args:
            unclip: Factor of shape ``()`` that undoes gradient clipping and loss scaling.
            accept: Whether the step counts, a boolean of shape ``()``: all gradients are finite.
        """

    def read(self) -> Tensor:
        """Return the score of every component, shape ``(C,)``, finite and at least 0."""

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Follow the components through a resize.

        New state takes the place of the old, which is not written to: a resize may be undone.

        Args:
            sites: The same sites at their new ranks.
            sources: For each new component the index of the old one, -1 if newborn, shape ``(C,)``,
                on any device.
            before: What brings old state back whose memory is freed; without it old state lives on
                beside the new one as long as it is held.
        """

    def state(self) -> dict[str, Tensor]:
        """Return everything a resumed run needs, by name."""

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""
