"""An exponential moving average with one count for each component."""

from copy import copy
from typing import Self

import torch
from torch import Tensor


def follow(state: Tensor, sources: Tensor) -> Tensor:
    """Reorder per-component state: entry i becomes ``state[sources[i]]``, or 0 where that is -1."""
    if len(state) == 0:  # nothing to select from: all are newborn
        return state.new_zeros((len(sources), *state.shape[1:]))
    sources = sources.to(state.device)
    moved = state.index_select(0, sources.clamp_min(0))
    return moved * (sources >= 0).to(state.dtype).view(-1, *[1] * (state.ndim - 1))


class ComponentAverage:
    r"""Bias-corrected exponential moving average of one number a component.

    .. math:: E_t = \beta E_{t-1} + (1 - \beta) x_t, \qquad \hat E_t = E_t / (1 - \beta^{n_t})

    Each component has its own count :math:`n_t`, so a newborn is judged on its own life.

    Args:
        components: Number of components.
        decay: :math:`\beta` in [0, 1).
        like: A tensor on the device where the state lives.
    """

    def __init__(self, components: int, decay: float, like: Tensor) -> None:
        self.decay = decay
        self._sum = torch.zeros(components, device=like.device)
        self._weight = torch.zeros(components, device=like.device)

    def update(self, values: Tensor, accept: Tensor) -> None:
        """Fold in one step, unless the boolean scalar ``accept`` is false; no host sync.

        A number that is not finite is left out: squares overflow where gradients do not yet.

        Args:
            values: The step's numbers, shape ``(C,)``.
            accept: Whether the step counts, a boolean tensor of shape ``()``.
        """
        counts = accept & torch.isfinite(values)
        gain = (1 - self.decay) * counts
        self._sum += gain * (torch.where(counts, values, 0) - self._sum)
        self._weight += gain * (1 - self._weight)

    def read(self) -> Tensor:
        """Return the corrected averages, shape ``(C,)``; 0 for a component never updated."""
        return self._sum / self._weight.clamp_min(torch.finfo(self._weight.dtype).tiny)

    def followed(self, sources: Tensor) -> Self:
        """Return the average of the components after an event; newborns (-1) start afresh."""
        moved = copy(self)
        moved._sum = follow(self._sum, sources)
        moved._weight = follow(self._weight, sources)
        return moved

    def state(self) -> dict[str, Tensor]:
        """Return the state by name."""
        return {"sum": self._sum, "weight": self._weight}

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned, onto the device that the state lives on now."""
        self._sum = state["sum"].to(self._sum.device)
        self._weight = state["weight"].to(self._weight.device)
