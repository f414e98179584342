"""Turn a decided plan into the record of what it did, and records into plain values."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import TypeAdapter

from rankflow.records import BoolArray, ComponentChange, ComponentTable, RankEvent, RankPlan

_BORN = "demand per parameter"
_EVENTS = TypeAdapter(list[RankEvent])


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
    before, after = _magnitudes(table, plan)
    spent_before = table.cost_of(table.ranks, before)
    parameters = table.costs_of(plan.ranks, after)
    reason = "the budget fell" if spent_before > limit else "another site promises more"
    importance = np.bincount(table.site_index, weights=table.scores, minlength=len(names))
    return RankEvent(
        index=index,
        step=step,
        limit=limit,
        spent_before=spent_before,
        spent=int(parameters.sum()),
        ranks_before=dict(zip(names, table.ranks.tolist(), strict=True)),
        ranks=dict(zip(names, plan.ranks.tolist(), strict=True)),
        importance=dict(zip(names, importance.tolist(), strict=True)),
        pruned=(*_pruned(table, plan, reason), *_changes(table, before & ~after, reason)),
        born=(*_born(table, plan), *_changes(table, after & ~before, _BORN)),
        seconds=seconds,
        magnitudes={}
        if table.magnitudes is None
        else dict(zip(names, after.tolist(), strict=True)),
        parameters=dict(zip(names, parameters.tolist(), strict=True)),
        magnitude_change=_magnitude_change(table, before),
    )


def dump_events(events: Sequence[RankEvent]) -> list[dict[str, Any]]:
    """Return events as plain values."""
    plain: list[dict[str, Any]] = _EVENTS.dump_python(list(events), mode="json")
    return plain


def load_events(values: Sequence[dict[str, Any]]) -> list[RankEvent]:
    """Return the events that ``dump_events`` was given."""
    return _EVENTS.validate_python(values)


def _magnitudes(table: ComponentTable, plan: RankPlan) -> tuple[BoolArray, BoolArray]:
    """Return which sites train a budgeted magnitude before and after, each shape ``(S,)``."""
    if table.magnitudes is None:
        none = np.zeros(len(table.sites), dtype=np.bool_)
        return none, none
    before = table.magnitudes.on
    return before, before if plan.magnitudes is None else plan.magnitudes


def _magnitude_change(table: ComponentTable, on: BoolArray) -> dict[str, float]:
    """Tell how far magnitudes stood from the norms, at the sites that train one."""
    if table.magnitude_change is None:
        return {}
    return {
        site.name: float(change)
        for site, is_on, change in zip(table.sites, on, table.magnitude_change, strict=True)
        if site.has_magnitude and (is_on or not site.is_budgeted)
    }


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


def _changes(table: ComponentTable, changed: BoolArray, reason: str) -> tuple[ComponentChange, ...]:
    """Tell of the magnitudes that changed; there are none where the budget does not cover them."""
    if table.magnitudes is None:
        return ()
    scores = table.magnitudes.scores
    return tuple(
        ComponentChange(table.sites[s].name, None, float(scores[s]), reason)
        for s in np.flatnonzero(changed)
    )
