r"""The part of a component's update that the magnitude cannot express already.

DoRA's effective weight has rows :math:`c_j V_j` with :math:`V = W + s B A` and
:math:`c_j = m_j / n_j`. Along its own row a component only stretches it, which the magnitude does
for nothing; across it, it turns the row, which nothing else can do. The energy of the turn is

.. math::
    E_i = s^2 \sum_j c_j^2 B_{ji}^2
        \Bigl( \lVert a_i \rVert^2 - \bigl( (V A^\top)_{ji} / n_j \bigr)^2 \Bigr).

Without a magnitude there is nothing to subtract, and this is the energy of the component itself,
:math:`s^2 \lVert b_i \rVert^2 \lVert a_i \rVert^2`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rankflow.adapters.base_weight import base_rows, magnitude_factor
from rankflow.adapters.dora import norms_of
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site


class Tangential:
    """The tangential energy of every component now, over all sites.

    Args:
        sites: The sites whose components are scored.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Do nothing: the score is read off the weights."""

    @torch.no_grad()
    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        home = self._sites[0].A.device
        return torch.cat([_energies(site).to(home) for site in self._sites])

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Do nothing: there is no state."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""


def _energies(site: Site) -> Tensor:
    A, B = site.A.flatten(1), site.effective_B.flatten(1)
    A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (A, B))
    lengths = A.square().sum(dim=1)  # (rank,)
    if site.magnitude is None:
        return site.scale**2 * lengths * B.square().sum(dim=0)
    norms = norms_of(site).to(A.dtype)  # (out,)
    factor = magnitude_factor(site.magnitude, norms)
    # V A^T, with W A^T and the small Gram matrix instead of V
    along = base_rows(site.layer).to(A.dtype) @ A.T + site.scale * (B @ (A @ A.T))  # (out, rank)
    across = (lengths - (along / norms.unsqueeze(1)).square()).clamp_min(0)
    return site.scale**2 * ((factor.unsqueeze(1) * B).square() * across).sum(dim=0)
