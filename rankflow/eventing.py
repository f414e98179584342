"""Turn a decided plan into the record of what it did."""

import numpy as np

from rankflow.records import (
    BoolArray,
    ComponentChange,
    ComponentTable,
    MagnitudeTable,
    RankEvent,
    RankPlan,
)

_BORN = "demand per parameter"


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
    on = None if table.magnitudes is None else table.magnitudes.on
    over_budget = table.cost_of(table.ranks, on) > limit
    reason = "the budget fell" if over_budget else "another site promises more"
    importance = np.bincount(table.site_index, weights=table.scores, minlength=len(names))
    return RankEvent(
        index=index,
        step=step,
        limit=limit,
        spent_before=table.cost_of(table.ranks, on),
        spent=table.cost_of(plan.ranks, None if on is None else plan.magnitudes),
        ranks_before=dict(zip(names, table.ranks.tolist(), strict=True)),
        ranks=dict(zip(names, plan.ranks.tolist(), strict=True)),
        importance=dict(zip(names, importance.tolist(), strict=True)),
        pruned=(*_pruned(table, plan, reason), *_turned_off(table, plan, reason)),
        born=(*_born(table, plan), *_turned_on(table, plan)),
        seconds=seconds,
        magnitudes=_magnitudes(table, plan),
    )


def _pruned(table: ComponentTable, plan: RankPlan, reason: str) -> tuple[ComponentChange, ...]:
    scores = np.split(table.scores, np.cumsum(table.ranks)[:-1])
    return tuple(
        ComponentChange(site.name, int(component), float(scores[s][component]), reason)
        for s, (site, keep) in enumerate(zip(table.sites, plan.keep, strict=True))
        for component in np.setdiff1d(np.arange(table.ranks[s]), keep)
    )


def _born(table: ComponentTable, plan: RankPlan) -> tuple[ComponentChange, ...]:
    return tuple(
        ComponentChange(site.name, len(keep) + k, float(demand), _BORN)
        for site, keep, births, demand in zip(
            table.sites, plan.keep, plan.births, table.demand, strict=True
        )
        for k in range(births)
    )


def _turned_off(table: ComponentTable, plan: RankPlan, reason: str) -> tuple[ComponentChange, ...]:
    if table.magnitudes is None or plan.magnitudes is None:
        return ()
    gone = table.magnitudes.on & ~plan.magnitudes
    return _magnitude_changes(table, table.magnitudes, gone, reason)


def _turned_on(table: ComponentTable, plan: RankPlan) -> tuple[ComponentChange, ...]:
    if table.magnitudes is None or plan.magnitudes is None:
        return ()
    new = plan.magnitudes & ~table.magnitudes.on
    return _magnitude_changes(table, table.magnitudes, new, _BORN)


def _magnitude_changes(
    table: ComponentTable, magnitudes: MagnitudeTable, changed: BoolArray, reason: str
) -> tuple[ComponentChange, ...]:
    return tuple(
        ComponentChange(table.sites[s].name, None, float(magnitudes.scores[s]), reason)
        for s in np.flatnonzero(changed)
    )


def _magnitudes(table: ComponentTable, plan: RankPlan) -> dict[str, bool]:
    if table.magnitudes is None or plan.magnitudes is None:
        return {}
    names = [site.name for site in table.sites]
    return dict(zip(names, plan.magnitudes.tolist(), strict=True))
