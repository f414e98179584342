"""When to reallocate, under what budget, and how much of it may move.

A policy only answers which ranks are best for the scores of a table. The scheduler puts the
question: beside the live components it offers *candidates*, components that do not exist yet and
whose score is the site's demand, and it limits how many there are. So pruning, growing and
training at a constant budget are one problem, and every policy solves all three.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from rankflow.allocation.policies import Policy, plan_from_ranks
from rankflow.allocation.pools import pool_magnitudes, unpool_plan
from rankflow.records import ComponentTable, FloatArray, IntArray, RankPlan


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Decides the events of a run; pure, so all processes of a job decide the same.

    Attributes:
        policy: Ranks for a table under a limit.
        budget_at: Budget in parameters after a number of optimizer steps.
        total_steps: Optimizer steps of the whole run.
        warmup_steps: Steps before the first event may happen.
        cooldown_steps: Steps at the end without events.
        every: Steps from one event to the next; the last falls where the cool-down begins.
        recycle: Largest share of the budget that one event may move from pruned to newborn
            components; it decays linearly to 0 where the cool-down begins.
        hysteresis: A newborn must promise ``1 + hysteresis`` times the score of what it displaces.
        protect: Events through which a newborn is not pruned, unless the budget leaves no choice.
    """

    policy: Policy
    budget_at: Callable[[int], int]
    total_steps: int
    warmup_steps: int
    cooldown_steps: int
    every: int
    recycle: float
    hysteresis: float
    protect: int

    @property
    def last_event(self) -> int:
        """The step at which the cool-down begins."""
        return self.total_steps - self.cooldown_steps

    def event_steps(self) -> list[int]:
        """Return the steps after which an event happens, ascending."""
        return [step for step in range(1, self.last_event + 1) if self.is_due(step)]

    def is_due(self, step: int) -> bool:
        """Whether an event happens after ``step`` optimizer steps."""
        since = step - self.warmup_steps
        regular = 0 < step < self.last_event and since >= 0 and since % self.every == 0
        return regular or step == self.last_event

    def plan(self, table: ComponentTable, step: int) -> RankPlan:
        """Decide one event.

        Args:
            table: All live components, and magnitudes if the budget covers them.
            step: Optimizer steps taken.

        Returns:
            A plan whose cost is within the budget at ``step``.

        Raises:
            BudgetError: The budget is below the cost of the minimum ranks.
        """
        limit = self.budget_at(step)
        pooled = pool_magnitudes(table)
        allowance = self.allowance(pooled.cost_of(pooled.ranks), step)
        guarded = _protect_young(pooled, self.protect, limit)
        candidates = _choose_candidates(pooled, allowance)
        promised = np.nextafter(pooled.demand / (1 + self.hysteresis), 0)  # the living win a tie
        offer = _offer(guarded, candidates, promised)
        target = self.policy(offer, limit)
        plan = plan_from_ranks(guarded, _moderate(pooled, target, allowance, limit))
        return unpool_plan(plan, table)

    def allowance(self, spent: int, step: int) -> int:
        """Parameters that newborns may take: what is free, and the share that may move.

        Args:
            spent: Trainable adapter parameters before the event.
            step: Optimizer steps taken.
        """
        limit = self.budget_at(step)
        window = self.last_event - self.warmup_steps
        remaining = min(max((self.last_event - step) / window, 0.0), 1.0)
        return max(limit - spent, 0) + int(self.recycle * remaining * limit)


def _protect_young(table: ComponentTable, protect: int, limit: int) -> ComponentTable:
    """Raise the young above their site's others, and the site's minimum rank to their number."""
    young = table.ages < protect
    site_index = table.site_index
    counts = np.bincount(site_index[young], minlength=len(table.sites))
    sites = tuple(
        replace(site, min_rank=max(site.min_rank, int(count)))
        for site, count in zip(table.sites, counts, strict=True)
    )
    best = np.zeros(len(sites))
    np.maximum.at(best, site_index, table.scores)
    above = np.nextafter(best, np.inf)[site_index]  # a tie would go to the older component
    guarded = replace(table, sites=sites, scores=np.where(young, above, table.scores))
    return guarded if guarded.cost_of(guarded.min_ranks) <= limit else table


def _choose_candidates(table: ComponentTable, allowance: int) -> IntArray:
    """Return how many newborns each site may ask for, shape ``(S,)``.

    The sites that promise most for a parameter come first. A site grows by one and a quarter of its
    rank at most, so that what is born there is judged before more is.
    """
    costs = table.component_costs
    most = np.minimum(1 + table.ranks // 4, table.max_ranks - table.ranks)
    counts = np.zeros_like(most)
    for site in np.argsort(-table.demand / costs, kind="stable"):
        if table.demand[site] > 0:
            counts[site] = min(most[site], allowance // costs[site])
            allowance -= int(counts[site] * costs[site])
    return counts


def _offer(table: ComponentTable, candidates: IntArray, promised: FloatArray) -> ComponentTable:
    """Append the candidates to their sites, each with the score that its site promises."""
    ends = np.cumsum(table.ranks)
    places = np.repeat(ends, candidates)
    return replace(
        table,
        ranks=table.ranks + candidates,
        scores=np.insert(table.scores, places, np.repeat(promised, candidates)),
        ages=np.insert(table.ages, places, 0),
    )


def _moderate(table: ComponentTable, target: IntArray, allowance: int, limit: int) -> IntArray:
    """Cut the births to the allowance, and give what that leaves back to live components."""
    costs = table.component_costs
    wanted = np.maximum(target - table.ranks, 0)
    births = np.zeros_like(wanted)
    for site in np.argsort(-wanted, kind="stable"):
        births[site] = min(wanted[site], allowance // costs[site])
        allowance -= int(births[site] * costs[site])
    ranks = np.minimum(table.ranks, target) + births
    if (births < wanted).any():
        _refill(table, ranks, limit)
    return ranks


def _refill(table: ComponentTable, ranks: IntArray, limit: int) -> None:
    """Spare the best components that would be pruned, as far as the budget goes, in place."""
    costs = table.component_costs
    free = limit - table.cost_of(ranks)
    site_index = table.site_index
    for component in np.argsort(-table.scores / costs[site_index], kind="stable"):
        site = site_index[component]
        if ranks[site] < table.ranks[site] and costs[site] <= free:
            ranks[site] += 1
            free -= int(costs[site])
