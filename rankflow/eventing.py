"""Turn a decided plan into the record of what it did."""

import numpy as np

from rankflow.records import ComponentChange, ComponentTable, RankEvent, RankPlan


def describe(
    table: ComponentTable, plan: RankPlan, index: int, step: int, limit: int, seconds: float
) -> RankEvent:
    """Record an event.

    Args:
        table: What was known when the plan was made.
        plan: What was done.
        index: Running number of the event.
        step: Optimizer steps taken.
        limit: Trainable adapter parameters that the budget allows from here on.
        seconds: Wall time of the event.
    """
    names = [site.name for site in table.sites]
    importance = np.bincount(table.site_index, weights=table.scores, minlength=len(names))
    return RankEvent(
        index=index,
        step=step,
        limit=limit,
        spent_before=table.cost_of(table.ranks),
        spent=table.cost_of(plan.ranks),
        ranks_before=dict(zip(names, table.ranks.tolist(), strict=True)),
        ranks=dict(zip(names, plan.ranks.tolist(), strict=True)),
        importance=dict(zip(names, importance.tolist(), strict=True)),
        pruned=_pruned(table, plan, limit),
        born=_born(table, plan),
        seconds=seconds,
    )


def _pruned(table: ComponentTable, plan: RankPlan, limit: int) -> tuple[ComponentChange, ...]:
    over_budget = table.cost_of(table.ranks) > limit
    reason = "the budget fell" if over_budget else "another site promises more"
    scores = np.split(table.scores, np.cumsum(table.ranks)[:-1])
    return tuple(
        ComponentChange(site.name, int(component), float(scores[s][component]), reason)
        for s, (site, keep) in enumerate(zip(table.sites, plan.keep, strict=True))
        for component in np.setdiff1d(np.arange(table.ranks[s]), keep)
    )


def _born(table: ComponentTable, plan: RankPlan) -> tuple[ComponentChange, ...]:
    return tuple(
        ComponentChange(site.name, len(keep) + k, float(demand), "demand per parameter")
        for site, keep, births, demand in zip(
            table.sites, plan.keep, plan.births, table.demand, strict=True
        )
        for k in range(births)
    )
