r"""Post-hoc truncation: cut a trained LoRA or DoRA adapter down to a budget by its SVD.

The control that any dynamic-rank method has to beat: train at a high rank, then keep what matters.
The update of site i is :math:`s_i B_i A_i = \sum_k \sigma_{ik} u_{ik} v_{ik}^T`. Dropping terms
costs a squared error of

.. math:: \sum_{(i, k) \text{ dropped}} \sigma_{ik}^2

over all sites together, the least that any adapter of those ranks can reach (Eckart and Young
1936). So which terms stay is a knapsack of values :math:`\sigma_{ik}^2`, whose weights are the
parameters of a component.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from peft import PeftModel

from rankflow import surgery
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.adapters.newborns import orthogonal
from rankflow.adapters.rebuild import grow
from rankflow.adapters.sites import Site, find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import sync_config
from rankflow.allocation.policies import allocate_knapsack, plan_from_ranks
from rankflow.export.decompose import factored_svd
from rankflow.records import ComponentTable, FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Truncation:
    """What a truncation left.

    Attributes:
        ranks: Rank of each site now, by site name.
        parameters: Trainable adapter parameters now, never above the budget.
        error: Norm of what was dropped from the updates of all sites, relative to their norm.
    """

    ranks: dict[str, int]
    parameters: int
    error: float


def truncate(model: PeftModel, parameters: int, adapter_name: str = "default") -> Truncation:
    """Cut an adapter down to the components of greatest energy that fit a budget, in place.

    Magnitudes and scales stay as they are, and count. The adapter stays one of stock PEFT, its
    components orthogonal and in order of their singular values. An optimizer made before does not
    train it any more.

    Args:
        model: A model with a LoRA or DoRA adapter of any ranks.
        parameters: The budget: trainable adapter parameters.
        adapter_name: The adapter.

    Raises:
        BudgetError: The magnitudes alone cost more than the budget.
        UnsupportedError: The adapter's components have gates.
        SiteError: The model has no such adapter.
    """
    sites = find_sites(model, adapter_name)
    gated = [site.name for site in sites if site.gate is not None]
    if gated:
        raise UnsupportedError(
            f"truncation is for LoRA and DoRA, and site {gated[0]!r} has gated components, of "
            "another cost; train it with components = 'factors'"
        )
    energies = [_diagonalise(site) for site in sites]
    table = _tabulate(sites, energies)
    allocation = allocate_knapsack(table, parameters, exact=True)
    plan = plan_from_ranks(table, allocation.ranks)
    surgery.resize(sites, plan, optimizer=None, newborns=orthogonal(torch.Generator()))
    sync_config(model, adapter_name, sites)
    for site in sites:
        translate_state_dicts(site.layer, adapter_name)
    return Truncation(
        ranks={site.name: site.rank for site in sites},
        parameters=sum(site.parameters for site in sites),
        error=_relative_error(table, plan.keep),
    )


@torch.no_grad()
def _diagonalise(site: Site) -> FloatArray:
    r"""Write the update as its SVD, :math:`B = U \sqrt{S}, A = \sqrt{S} V^T`, at the same rank.

    Returns:
        The energy :math:`(s \sigma_k)^2` of each component, descending, shape ``(rank,)``.
    """
    U, S, V = factored_svd(site.B.flatten(1), site.A.flatten(1))
    spare = site.rank - len(S)  # components beyond what the matrix can hold
    site.B.copy_(grow(U * S.sqrt(), 1, spare).view(site.B.shape))
    site.A.copy_(grow(V * S.sqrt(), 1, spare).T.reshape(site.A.shape))
    return grow((site.scale * S) ** 2, 0, spare).numpy()


def _tabulate(sites: Sequence[Site], energies: Sequence[FloatArray]) -> ComponentTable:
    ranks = np.array([site.rank for site in sites], dtype=np.int64)
    return ComponentTable(
        sites=tuple(
            site.describe(0, site.rank, magnitude="never" if site.magnitude is None else "always")
            for site in sites
        ),
        ranks=ranks,
        scores=np.concatenate(energies),
        ages=np.zeros(ranks.sum(), dtype=np.int64),
        demand=np.zeros(len(sites)),
    )


def _relative_error(table: ComponentTable, keep: Sequence[IntArray]) -> float:
    first = np.cumsum(table.ranks) - table.ranks
    kept = np.concatenate([start + part for start, part in zip(first, keep, strict=True)])
    dropped = np.delete(table.scores, kept).sum()
    total = table.scores.sum()
    return float(np.sqrt(dropped / total)) if total > 0 else 0.0
