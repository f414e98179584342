r"""Dynamic-Rank DoRA's DEM regulariser: it holds the entries of every vector to their mean.

.. math:: R = \frac{1}{2 r_0 L} \Bigl( \sum_i \mathrm{Var}(a_i) + \sum_i \mathrm{Var}(b_i) \Bigr)

over the rows of A and the columns of B of all L sites, where :math:`r_0 L` is the number of
components at the start and Var the mean squared deviation of a vector's entries (arXiv 2405.17357;
the gate is no part of :math:`b_i`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankflow.adapters.sites import Site


@dataclass(frozen=True, slots=True)
class Regulariser:
    """The regulariser of a run: on from the start until pruning ends, if its weight is above 0.

    Attributes:
        sites: The sites.
        components: Components of all sites at the start, ``r0 L``, at least 1.
        eta: Weight of the regulariser.
        end: Optimizer steps after which it is off.
    """

    sites: tuple[Site, ...]
    components: int
    eta: float
    end: int

    def penalty(self, steps: int) -> Tensor:
        """Return ``eta * R`` after so many optimizer steps, a differentiable scalar."""
        if not self._is_on(steps):
            return torch.zeros((), device=self.sites[0].A.device)
        return self.eta * penalty(self.sites, self.components)

    def add_gradient(self, steps: int) -> None:
        """Add the gradient of ``eta * R`` after so many optimizer steps."""
        if self._is_on(steps):
            add_gradient(self.sites, self.components, self.eta)

    def _is_on(self, steps: int) -> bool:
        return self.eta > 0 and steps < self.end


def penalty(sites: Sequence[Site], components: int) -> Tensor:
    """Return R, a differentiable scalar.

    Args:
        sites: The sites, whose components may have become fewer.
        components: Components of all sites at the start, ``r0 L``.
    """
    home = sites[0].A.device
    spreads = [rows.var(dim=1, correction=0).sum().to(home) for _, _, rows in _vectors(sites)]
    return torch.stack(spreads).sum() / (2 * components)


@torch.no_grad()
def add_gradient(sites: Sequence[Site], components: int, eta: float) -> None:
    r"""Add the gradient of ``eta * R``, :math:`\eta (a_i - \bar a_i) / (n\, r_0 L)`.

    Args:
        sites: The sites.
        components: Components of all sites at the start, ``r0 L``.
        eta: Weight of the regulariser.
    """
    for parameter, axis, rows in _vectors(sites):
        if not parameter.requires_grad:
            continue
        pull = (rows - rows.mean(dim=1, keepdim=True)) * (eta / (rows.shape[1] * components))
        gradient = pull.movedim(0, axis).reshape(parameter.shape).to(parameter.dtype)
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _vectors(sites: Sequence[Site]) -> list[tuple[nn.Parameter, int, Tensor]]:
    """Return A and B of every site, the axis of their vectors, and these as rows in float32."""
    vectors = []
    for site in sites:
        for parameter, axis in ((site.A, 0), (site.B, 1)):
            rows = parameter.flatten(1).movedim(axis, 0)
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            vectors.append((parameter, axis, wide))
    return vectors
