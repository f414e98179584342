r"""AdaLoRA's smoothed sensitivity times uncertainty (arXiv 2303.10512, equations 8-11).

.. math::
    I = |w \, \partial L / \partial w|, \quad
    \bar I \leftarrow \beta \bar I + (1 - \beta) I, \quad
    \bar U \leftarrow \beta \bar U + (1 - \beta) |I - \bar I|, \quad
    s = \bar I \, \bar U

for every entry w of A and B; a component's score is the mean of s over its row of A plus the mean
over its column of B. Where it has a gate, the gate's own s is added, as AdaLoRA adds that of the
singular value in its place.
"""

from collections.abc import Sequence
from copy import copy
from typing import Self

import numpy as np
import torch
from torch import Tensor

from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.adapters.way_back import whole
from rankflow.importance.average import follow
from rankflow.importance.rows import Rows

_TILE = 2**18  # entries


class _FactorSensitivity:
    """The two averages of every entry of one factor, stacked like its rows."""

    def __init__(self, rows: Rows, decay: float) -> None:
        self.rows = rows
        self.decay = decay
        self.sensitivity = [torch.zeros_like(w) for w in rows.weights()]
        self.uncertainty = [torch.zeros_like(w) for w in rows.weights()]

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        weights, gradients = self.rows.weights(), self.rows.gradients()
        averages = zip(self.sensitivity, self.uncertainty, strict=True)
        for w, g, (mean, spread) in zip(weights, gradients, averages, strict=True):
            gain = ((1 - self.decay) * accept).to(w.device)
            entry = torch.where(accept.to(w.device), w.mul_(g).abs_().mul_(unclip.to(w.device)), 0)
            mean.add_(gain * (entry - mean))
            spread.add_(gain * ((entry - mean).abs() - spread))

    def read(self) -> Tensor:
        pairs = zip(self.sensitivity, self.uncertainty, strict=True)
        return self.rows.per_component([_mean_of_product(mean, spread) for mean, spread in pairs])

    def followed(self, rows: Rows, sources: Tensor, before: Savepoint | None) -> Self:
        moved = copy(self)
        moved.sensitivity = _move(self.sensitivity, self.rows, rows, sources, before)
        moved.uncertainty = _move(self.uncertainty, self.rows, rows, sources, before)
        moved.rows = rows
        return moved


class Sensitivity:
    """AdaLoRA's score of every component.

    Args:
        sites: The sites whose components are scored.
        decay: Decay of both averages, in [0, 1); 0.85 in the paper.
    """

    def __init__(self, sites: Sequence[Site], decay: float) -> None:
        self._factors = {name: _FactorSensitivity(r, decay) for name, r in _rows(sites).items()}

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one step's gradients, if ``accept``."""
        for factor in self._factors.values():
            factor.observe(unclip, accept)

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        return torch.stack([factor.read() for factor in self._factors.values()]).sum(dim=0)

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Follow the components through a resize; under a savepoint the averages go by the host."""
        self._factors = {
            name: self._factors[name].followed(rows, sources, before)
            for name, rows in _rows(sites).items()
        }

    def state(self) -> dict[str, Tensor]:
        """Return both averages of all factors, by factor and width."""
        return dict(self._tensors())

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the averages."""
        for key, tensor in self._tensors():
            tensor.copy_(state[key])

    def _tensors(self) -> list[tuple[str, Tensor]]:
        return [
            (f"{factor}.{name}.{i}", tensor)
            for factor, averages in self._factors.items()
            for name in ("sensitivity", "uncertainty")
            for i, tensor in enumerate(getattr(averages, name))
        ]


def _rows(sites: Sequence[Site]) -> dict[str, Rows]:
    pair = {"A": Rows.of_A(sites), "B": Rows.of_B(sites)}
    return pair if sites[0].gate is None else pair | {"gate": Rows.of_gates(sites)}


def _mean_of_product(mean: Tensor, spread: Tensor) -> Tensor:
    """Return the mean of ``mean * spread`` over each row, a few rows at a time."""
    lines = max(1, _TILE // mean.shape[1])
    pairs = zip(mean.split(lines), spread.split(lines), strict=True)
    return torch.cat([(m * s).mean(dim=1) for m, s in pairs])


def _move(
    state: list[Tensor], old: Rows, new: Rows, sources: Tensor, before: Savepoint | None
) -> list[Tensor]:
    """Carry stacked per-entry state to the components' new places.

    A stack holds the entries of all sites, and so would a second one beside it: what may be undone
    waits on the host, and is the way back too.
    """
    if before is not None:
        state = [_set_aside(stack, before) for stack in state]
    parts = old.split(state)
    first_old, first_new = (np.cumsum([0, *rows.ranks]) for rows in (old, new))

    def moved(site: int) -> Tensor:
        indices = sources[first_new[site] : first_new[site + 1]]
        local = torch.where(indices >= 0, indices - first_old[site], -1)
        return follow(parts[site], local)

    joined = new.join(moved)
    if before is not None:
        for stack in joined:
            before.made(stack)
    return joined


def _set_aside(stack: Tensor, before: Savepoint) -> Tensor:
    way_back = whole(stack)
    before.let_go(stack, way_back)
    return way_back.rest
