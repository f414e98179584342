r"""What a site's magnitude is worth, in the unit of a component's score.

Without its magnitude m a site computes with :math:`m = n`, the norms of its rows: taking m away
moves the weights by :math:`(m - n)` along the rows. So each score of a component has a counterpart:

* the first-order change of the loss,
  :math:`T = \langle m - n, \partial L / \partial m \rangle`, for ``taylor`` and ``fisher``;
* the mean over the entries of AdaLoRA's product of averages, with
  :math:`I = |(m - n)\, \partial L / \partial m|`, for ``sensitivity``;
* the size of the move, :math:`\lVert m - n \rVert`, for ``norm``, and its square, an energy, for
  ``tangential``.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import numpy as np
import torch
from torch import Tensor

from rankflow.adapters.base_weight import is_zero_row
from rankflow.adapters.dora import norms_reader, row_factor
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.errors import SpecError
from rankflow.importance.average import ComponentAverage
from rankflow.importance.controls import RandomScore
from rankflow.importance.dots import Dots
from rankflow.importance.scorer import Scorer
from rankflow.specs.budget import Score


def make_magnitude_scorer(name: Score, sites: Sequence[Site], *, decay: float, seed: int) -> Scorer:
    """Make the scorer of magnitudes that belongs to a score of components.

    Its ``read`` returns one number a site, shape ``(S,)``, 0 where the magnitude is off, and the
    ``sources`` of its ``reindex`` are the sites themselves, or -1 where a magnitude is new.

    Args:
        name: A score's name in a budget spec.
        sites: The sites whose magnitudes are scored.
        decay: Decay of the moving average, in [0, 1), where the score has one.
        seed: Seed of the random control.

    Raises:
        SpecError: The score says nothing of magnitudes.
    """
    match name:
        case "taylor" | "fisher":
            return GateOfMagnitude(sites, decay, name)
        case "sensitivity":
            return SensitivityOfMagnitude(sites, decay)
        case "norm":
            return SizeOfMagnitude(sites, power=1)
        case "tangential":
            return SizeOfMagnitude(sites, power=2)
        case "uniform":
            return SizeOfMagnitude(sites, power=0)
        case "random":
            # With the components' seed, each would draw the number of some component.
            own = int(np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1)[0])
            return RandomScore(len(sites), own, sites[0].A.device)
        case "frobenius":
            raise SpecError(f"the score {name!r} says nothing of magnitudes; use 'taylor'")
        case _:
            assert_never(name)


@torch.no_grad()
def change_of_magnitudes(sites: Sequence[Site]) -> Tensor:
    r"""Mean of :math:`|m_j / n_j - 1|` over the rows of each site, shape ``(S,)``.

    It is how far the magnitude stretches or shrinks the rows of ``W + s B A``, as a share of their
    length; 0 where no magnitude is trained.

    Args:
        sites: The sites.
    """
    changes = torch.zeros(len(sites), device=sites[0].A.device)
    for s, site in enumerate(sites):
        if site.magnitude is not None:
            changes[s].copy_((row_factor(site) - 1).abs().mean(), non_blocking=True)
    return changes


class _Moves:
    """The entries of all magnitudes that are on, end to end; make a new one after every resize."""

    def __init__(self, sites: Sequence[Site]) -> None:
        on = [(site, m) for site in sites if (m := site.magnitude) is not None]
        self._magnitudes = [m for _, m in on]
        self._readers = [norms_reader(site) for site, _ in on]
        self._home = sites[0].A.device
        self._is_spread = any(m.device != self._home for m in self._magnitudes)
        self.entries = [0 if site.magnitude is None else site.out_features for site in sites]
        self.lengths = torch.tensor(self.entries, device=self._home)
        self.is_on = (self.lengths > 0).float()
        lengths = [m.numel() for m in self._magnitudes]
        self._dots = Dots(self._magnitudes, [1] * len(lengths), lengths)
        places = [s for s, entries in enumerate(self.entries) if entries > 0]
        self._places = torch.tensor(places, dtype=torch.long, device=self._home)

    def moves(self) -> Tensor:
        """Return ``m - n``, shape ``(entries,)``; 0 where a row is zero, which m cannot move."""
        norms = self._flat([read() for read in self._readers])
        moves = self._flat(self._magnitudes) - norms
        return torch.where(is_zero_row(norms), 0, moves).float()

    def gradients(self) -> Tensor:
        """Return the gradients, shape ``(entries,)``; a magnitude without one counts as zero."""
        gradients = [m.grad for m in self._magnitudes]
        pairs = zip(gradients, self._magnitudes, strict=True)
        return self._flat([torch.zeros_like(m) if g is None else g for g, m in pairs]).float()

    def dots(self) -> Tensor:
        """Return the sum of each site's moves times gradients, shape ``(S,)``."""
        sums = self._dots.read([read() for read in self._readers])
        if sums is None:
            return self.sum_by_site(self.moves() * self.gradients())
        return sums.new_zeros(len(self.entries)).index_copy_(0, self._places, sums)

    def sum_by_site(self, entries: Tensor) -> Tensor:
        """Sum entries over each site, shape ``(S,)``."""
        # `unsafe` leaves out a check that would wait for the device.
        return torch.segment_reduce(entries, "sum", lengths=self.lengths, unsafe=True)

    @torch.no_grad()
    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        if not tensors:
            return torch.zeros(0, device=self._home)
        if self._is_spread:
            tensors = [t.to(self._home, non_blocking=True) for t in tensors]
        return torch.cat([t if t.ndim == 1 else t.flatten() for t in tensors])


class GateOfMagnitude:
    r"""First- or second-order change of the loss without the magnitude, from :math:`E[T^2]`.

    Args:
        sites: The sites whose magnitudes are scored.
        decay: Decay of the average, in [0, 1).
        form: ``taylor`` is :math:`\sqrt{E[T^2]}`, ``fisher`` is :math:`E[T^2] / 2`.
    """

    def __init__(
        self, sites: Sequence[Site], decay: float, form: Literal["taylor", "fisher"]
    ) -> None:
        self._form = form
        self._moves = _Moves(sites)
        self._second_moment = ComponentAverage(len(sites), decay, like=sites[0].A)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one step's gradients, if ``accept``."""
        change = self._moves.dots() * unclip
        self._second_moment.update(change.square(), accept)

    def read(self) -> Tensor:
        """Return the scores, shape ``(S,)``."""
        moment = self._second_moment.read() * self._moves.is_on
        return moment.sqrt() if self._form == "taylor" else moment / 2

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Follow the magnitudes through a resize."""
        self._moves = _Moves(sites)
        self._second_moment = self._second_moment.followed(sources)

    def state(self) -> dict[str, Tensor]:
        """Return the average."""
        return self._second_moment.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the average."""
        self._second_moment.load(state)


class SensitivityOfMagnitude:
    """AdaLoRA's smoothed sensitivity times uncertainty, averaged over a magnitude's entries.

    Args:
        sites: The sites whose magnitudes are scored.
        decay: Decay of both averages, in [0, 1).
    """

    def __init__(self, sites: Sequence[Site], decay: float) -> None:
        self._decay = decay
        self._moves = _Moves(sites)
        entries = self._moves.moves()
        self._averages = entries.new_zeros((2, len(entries)))

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one step's gradients, if ``accept``."""
        gain = (1 - self._decay) * accept
        entry = (self._moves.moves() * self._moves.gradients() * unclip).abs()
        entry = torch.where(accept, entry, 0)
        mean, spread = self._averages
        mean += gain * (entry - mean)
        spread += gain * ((entry - mean).abs() - spread)

    def read(self) -> Tensor:
        """Return the scores, shape ``(S,)``."""
        total = self._moves.sum_by_site(self._averages.prod(dim=0))
        return total / self._moves.lengths.clamp_min(1)

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Follow the magnitudes through a resize."""
        old = self._averages.split(self._moves.entries, dim=1)
        self._moves = _Moves(sites)
        parts = [
            old[source] if source >= 0 and length > 0 else self._averages.new_zeros((2, length))
            for source, length in zip(sources.tolist(), self._moves.entries, strict=True)
        ]
        self._averages = torch.cat(parts, dim=1)

    def state(self) -> dict[str, Tensor]:
        """Return both averages."""
        return {"averages": self._averages}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore both averages."""
        self._averages.copy_(state["averages"])


class SizeOfMagnitude:
    r"""The size of the move that the magnitude makes now, :math:`\lVert m - n \rVert^p`.

    Args:
        sites: The sites whose magnitudes are scored.
        power: p.
    """

    def __init__(self, sites: Sequence[Site], power: int) -> None:
        self._sites = tuple(sites)
        self._power = power

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Do nothing: the score is read off the weights."""

    def read(self) -> Tensor:
        """Return the scores, shape ``(S,)``."""
        moves = _Moves(self._sites)
        size = moves.sum_by_site(moves.moves().square()).sqrt()
        return size**self._power * moves.is_on

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Do nothing: there is no state."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""
