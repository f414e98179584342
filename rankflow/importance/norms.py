r"""Scores from the size of a component, :math:`\lVert s\, b_i a_i^\top \rVert_F`."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rankflow.adapters.base_weight import magnitude_factor
from rankflow.adapters.dora import norms_of, norms_reader
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.importance.average import ComponentAverage


class Norm:
    r"""The size of a component now, :math:`s \lVert a_i \rVert \lVert b_i \rVert`, over all sites.

    Under DoRA row j of the update reaches the model times :math:`m_j / n_j`, and so does
    :math:`b_{ji}` here. A gate counts as part of :math:`b_i`, here and below.

    Args:
        sites: The sites whose components are scored.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Do nothing: the score is read off the weights."""

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        home = self._sites[0].A.device
        return torch.cat([_sizes(site).to(home) for site in self._sites])

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Do nothing: there is no state."""

    def state(self) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Do nothing."""


class Frobenius:
    r"""Dynamic-Rank DoRA's share of a component in its own site (arXiv 2405.17357).

    .. math:: S_i = \frac{\lVert b_i a_i^\top \rVert_F}{\lVert B A \rVert_F + 10^{-8}},
        \qquad \lVert B A \rVert_F^2 = \sum_{ij} (A A^\top \circ B^\top B)_{ij},

    averaged over steps. It compares components within a site, not worth across sites. Under DoRA
    :math:`b_{ji}` is scaled by :math:`m_j / n_j`, as above.

    Args:
        sites: The sites whose components are scored.
        decay: Decay of the average, in [0, 1); 0.9 in the paper.
    """

    def __init__(self, sites: Sequence[Site], decay: float) -> None:
        self._sites = tuple(sites)
        components = sum(site.rank for site in sites)
        self._share = ComponentAverage(components, decay, like=sites[0].A)
        self._live = _live(sites)

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in the shares of the weights now, if ``accept``."""
        home = self._sites[0].A.device
        shares = [_share(site, read()).to(home, non_blocking=True) for site, read in self._live]
        if shares:
            self._share.update(torch.cat(shares), accept)

    def read(self) -> Tensor:
        """Return the scores, shape ``(C,)``."""
        return self._share.read()

    def reindex(
        self, sites: Sequence[Site], sources: Tensor, before: Savepoint | None = None
    ) -> None:
        """Follow the components through a resize."""
        self._live = _live(sites)
        self._share = self._share.followed(sources)

    def state(self) -> dict[str, Tensor]:
        """Return the average."""
        return self._share.state()

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the average."""
        self._share.load(state)


def _live(sites: Sequence[Site]) -> list[tuple[Site, Callable[[], Tensor | None]]]:
    """Return the sites that have components, and what reads the norms of those with magnitudes."""
    return [
        (site, _no_norms if site.magnitude is None else norms_reader(site))
        for site in sites
        if site.rank > 0
    ]


def _no_norms() -> None:
    return None


@torch.no_grad()
def _share(site: Site, norms: Tensor | None) -> Tensor:
    A, B = _effective_factors(site, norms)
    products = (A @ A.T) * (B.T @ B)  # (rank, rank)
    sizes = products.diagonal().clamp_min(0).sqrt()
    return sizes / (products.sum().clamp_min(0).sqrt() + 1e-8)


@torch.no_grad()
def _sizes(site: Site) -> Tensor:
    A, B = _effective_factors(site, None if site.magnitude is None else norms_of(site))
    return site.scale * A.norm(dim=1) * B.norm(dim=0)


def _effective_factors(site: Site, norms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return A, ``(rank, in)``, and B, ``(out, rank)``, as they reach the model, without scale."""
    A, B = site.A.flatten(1).float(), site.effective_B.flatten(1).float()
    magnitude = site.magnitude
    if magnitude is not None and norms is not None:  # DoRA scales each row of the update by m / n
        B = B * magnitude_factor(magnitude, norms).float().unsqueeze(1)
    return A, B
