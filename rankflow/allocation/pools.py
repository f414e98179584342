"""A budgeted magnitude as one more component to choose, so that every policy weighs it.

To a policy it makes no difference what parameters do: an item has a cost and a score. A site's
magnitude therefore joins the table as a *pool*, a site of at most one component that costs ``out``.
Pruning, growing, protection and hysteresis then hold for magnitudes as they do for components.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from rankflow.records import BoolArray, ComponentTable, IntArray, RankPlan, SiteInfo


def magnitude_pool(site: SiteInfo) -> SiteInfo:
    """Return the pool of a site's magnitude.

    >>> site = SiteInfo("q_proj", "linear", 8, 4, True, min_rank=1, max_rank=4, is_budgeted=True)
    >>> pool = magnitude_pool(site)
    >>> pool.name, pool.component_cost, pool.max_rank
    ('q_proj.magnitude', 4, 1)
    """
    return replace(
        site,
        name=f"{site.name}.magnitude",
        in_features=0,
        has_magnitude=False,
        min_rank=0,
        max_rank=1,
        is_budgeted=False,
        has_gate=False,
        has_row_gate=False,
    )


def with_pools(sites: Sequence[SiteInfo]) -> tuple[SiteInfo, ...]:
    """Append the pools of all budgeted magnitudes to the sites."""
    return (*sites, *(magnitude_pool(site) for site in sites if site.is_budgeted))


def pool_magnitudes(table: ComponentTable) -> ComponentTable:
    """Move the budgeted magnitudes of a table into pools behind its sites."""
    if table.magnitudes is None:
        return table
    budgeted = _budgeted(table.sites)
    on = table.magnitudes.on[budgeted]
    scores = table.magnitudes.scores[budgeted]
    return ComponentTable(
        sites=with_pools(table.sites),
        ranks=np.concatenate([table.ranks, on.astype(np.int64)]),
        scores=np.concatenate([table.scores, scores[on]]),
        ages=np.concatenate([table.ages, table.magnitudes.ages[budgeted][on]]),
        demand=np.concatenate([table.demand, scores]),
    )


def unpool_plan(plan: RankPlan, table: ComponentTable) -> RankPlan:
    """Turn a plan for the pooled table into one for the table itself."""
    if table.magnitudes is None:
        return plan
    count = len(table.sites)
    return RankPlan(plan.keep[:count], plan.births[:count], magnitudes_at(plan.ranks, table.sites))


def magnitudes_at(ranks: IntArray, sites: Sequence[SiteInfo]) -> BoolArray:
    """Return which sites train a magnitude, shape ``(S,)``.

    Args:
        ranks: Ranks of the sites and of the pools behind them, shape ``(S + pools,)``.
        sites: The S sites.
    """
    on = np.array([site.has_magnitude for site in sites], dtype=np.bool_)
    on[_budgeted(sites)] = ranks[len(sites) :] > 0
    return on


def _budgeted(sites: Sequence[SiteInfo]) -> IntArray:
    return np.flatnonzero([site.is_budgeted for site in sites])
