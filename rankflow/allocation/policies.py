"""Allocation policies: pure, deterministic functions from a component table to target ranks.

All components of a site cost the same, so whatever rank a site gets, its best-scored components
are the ones to keep. A policy therefore decides ranks only, and `plan_from_ranks` turns them into
a plan. Every policy returns ranks, shape ``(S,)``, with

    min_ranks <= ranks <= max_ranks   and   table.cost_of(ranks) <= limit

where the limit counts everything that is trained: the magnitudes come off first. A limit below the
cost of the minimum ranks is a `BudgetError`; a policy that looks at scores raises a `RankFlowError`
if one is not a finite number of at least 0.

>>> small = SiteInfo("q_proj", "linear", 4, 4, has_magnitude=False, min_rank=0, max_rank=8)
>>> large = SiteInfo("up_proj", "linear", 4, 12, has_magnitude=False, min_rank=0, max_rank=8)
>>> table = ComponentTable(
...     sites=(small, large),
...     ranks=np.array([2, 2]),
...     scores=np.array([5.0, 4.0, 6.0, 1.0]),
...     ages=np.zeros(4, dtype=np.int64),
...     demand=np.zeros(2),
... )
>>> threshold(table, 24), knapsack(table, 24), proportional(table, 24), uniform(table, 24)
(array([1, 1]), array([1, 1]), array([2, 0]), array([1, 1]))
>>> plan = plan_from_ranks(table, np.array([1, 3]))
>>> plan.keep, plan.births
((array([0]), array([0, 1])), array([0, 1]))
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil

import numpy as np

from rankflow.allocation.knapsack import (
    count_before,
    solve_exact,
    solve_greedy,
    take_in_order,
)
from rankflow.errors import BudgetError, RankFlowError, SpecError
from rankflow.records import ComponentTable, FloatArray, IntArray, RankPlan, SiteInfo

Policy = Callable[[ComponentTable, int], IntArray]

POLICIES = (
    "threshold",
    "knapsack",
    "knapsack-exact",
    "proportional",
    "uniform",
    "random",
    "frozen",
)

# Water levels to search; the last one fills every site of any model to its maximum.
_LEVELS = range(2**62)
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True, slots=True)
class KnapsackResult:
    """Ranks of greatest total score, and how good they are at least.

    Attributes:
        ranks: Target rank of each site, shape ``(S,)``.
        value: Total score of the components that stay at these ranks.
        upper_bound: A proven bound on the value of any ranks within the limit; equal to ``value``
            if these ranks are proven optimal.
    """

    ranks: IntArray
    value: float
    upper_bound: float


def make_policy(name: str, *, seed: int = 0, pattern: IntArray | None = None) -> Policy:
    """Find a policy by its name.

    Args:
        name: One of ``POLICIES``.
        seed: Seed of ``random``.
        pattern: Ranks of ``frozen``, shape ``(S,)``.

    Raises:
        SpecError: If no policy has this name, or ``frozen`` comes without a pattern.
    """
    match name:
        case "threshold":
            return threshold
        case "knapsack":
            return knapsack
        case "knapsack-exact":
            return knapsack_exact
        case "proportional":
            return proportional
        case "uniform":
            return uniform
        case "random":
            return random_policy(seed)
        case "frozen":
            if pattern is None:
                raise SpecError("the policy 'frozen' needs a pattern: the rank of every site")
            return frozen_policy(pattern)
        case _:
            raise SpecError(f"no policy is named {name!r}; choose one of {', '.join(POLICIES)}")


def feasible_range(sites: Sequence[SiteInfo]) -> tuple[int, int]:
    """Cost of all sites at their minimum and at their maximum ranks, in parameters.

    >>> feasible_range([SiteInfo("q", "linear", 8, 4, True, min_rank=1, max_rank=4)])
    (16, 52)
    """
    fixed = sum(site.fixed_cost for site in sites)
    lowest = fixed + sum(site.component_cost * site.min_rank for site in sites)
    highest = fixed + sum(site.component_cost * site.max_rank for site in sites)
    return lowest, highest


def check_feasible(sites: Sequence[SiteInfo], limit: int) -> None:
    """Raise a `BudgetError` if the limit, in parameters, is below the cost of the minimum ranks."""
    lowest, highest = feasible_range(sites)
    if limit < lowest:
        raise BudgetError(
            f"a budget of {limit} parameters is less than the {lowest} that the minimum ranks of "
            f"the {len(sites)} sites cost; raise it (at most {highest} can be used) or lower the "
            "minimum ranks"
        )


def plan_from_ranks(table: ComponentTable, ranks: IntArray) -> RankPlan:
    """Keep the best components of each site up to its target rank; give birth to the rest.

    Of equal scores the one of lower index stays.

    Args:
        table: What is known of the components.
        ranks: Target rank of each site, shape ``(S,)``.

    Raises:
        RankFlowError: If a score is not a finite number of at least 0.
    """
    kept = np.flatnonzero(_places(table) < ranks[table.site_index])
    first = np.cumsum(table.ranks) - table.ranks
    kept_ranks = np.minimum(ranks, table.ranks)
    local = kept - np.repeat(first, kept_ranks)
    keep = tuple(np.split(local, np.cumsum(kept_ranks)[:-1]))
    return RankPlan(keep=keep, births=ranks - kept_ranks)


def threshold(table: ComponentTable, limit: int) -> IntArray:
    """Keep the best-scored components, whatever they cost, up to the first that no longer fits.

    One global threshold on the score, after the minimum ranks. Of equal scores the one of the
    earlier site, then of lower index, goes first. Never asks for births above the minimum ranks.

    AdaLoRA (arXiv 2303.10512); Dynamic-Rank DoRA (arXiv 2405.17357).
    """
    check_feasible(table.sites, limit)
    optional = _optional(table, _places(table))
    best_first = optional[np.argsort(-table.scores[optional], kind="stable")]
    sites = table.site_index[best_first]
    paid = np.cumsum(table.component_costs[sites])
    fitting = np.searchsorted(paid, limit - table.cost_of(table.min_ranks), side="right")
    return table.min_ranks + np.bincount(sites[:fitting], minlength=len(table.sites))


def knapsack(table: ComponentTable, limit: int) -> IntArray:
    """Keep the components of greatest total score that fit, by score per parameter.

    Almost always optimal; `allocate_knapsack` tells how far it can be from it.
    """
    return allocate_knapsack(table, limit).ranks


def knapsack_exact(table: ComponentTable, limit: int) -> IntArray:
    """Keep the components of greatest total score that fit, proven optimal."""
    return allocate_knapsack(table, limit, exact=True).ranks


def allocate_knapsack(table: ComponentTable, limit: int, *, exact: bool = False) -> KnapsackResult:
    """Maximise the total score within the limit, after the minimum ranks.

    Never asks for births above the minimum ranks. Components that are equally good per parameter
    are spread over the sites.

    Args:
        table: What is known of the components.
        limit: Parameters allowed in all.
        exact: Whether to close the last gap to the optimum by branch and bound.

    Raises:
        BudgetError: If the limit is below the cost of the minimum ranks.
        RankFlowError: If a score is not a finite number of at least 0.
    """
    check_feasible(table.sites, limit)
    places = _places(table)
    optional = _optional(table, places)
    optional = optional[np.argsort(places[optional], kind="stable")]
    sites = table.site_index[optional]
    solve = solve_exact if exact else solve_greedy
    found = solve(
        table.scores[optional],
        table.component_costs[sites],
        limit - table.cost_of(table.min_ranks),
    )
    ranks = table.min_ranks + np.bincount(sites[found.taken], minlength=len(table.sites))
    forced = float(table.scores[places < table.min_ranks[table.site_index]].sum())
    return KnapsackResult(ranks, forced + found.value, forced + found.upper_bound)


def proportional(table: ComponentTable, limit: int) -> IntArray:
    """Give each site a share of the parameters proportional to its total score.

    A site that reaches its maximum or minimum rank leaves or takes what the others share.
    Fractions of a component go to the largest remainders; what is then left, or all if every score
    is zero, is levelled out as `uniform` does. May ask for more components than a site has.
    """
    check_feasible(table.sites, limit)
    _check_scores(table)
    costs, capacity = table.component_costs, limit - table.fixed_cost
    totals = np.bincount(table.site_index, weights=table.scores, minlength=len(table.sites))
    shares = totals / totals.sum() if totals.any() else totals

    def shared_ranks(parameters: int) -> FloatArray:
        return np.clip(parameters * shares / costs, table.min_ranks, table.max_ranks)

    ideal = shared_ranks(_highest_level(shared_ranks, costs, capacity))
    ranks = np.floor(ideal).astype(np.int64)
    remainders = ideal - ranks
    largest_first = np.argsort(-remainders, kind="stable")[: np.count_nonzero(remainders)]
    ranks[take_in_order(largest_first, costs, capacity - int(costs @ ranks))] += 1
    return _level_out(costs, ranks, table.max_ranks, capacity)


def uniform(table: ComponentTable, limit: int) -> IntArray:
    """Give every site the largest equal rank that fits, within the bounds of each.

    What is left buys single components, spread evenly over the depth of the model.
    """
    check_feasible(table.sites, limit)
    capacity = limit - table.fixed_cost
    return _level_out(table.component_costs, table.min_ranks, table.max_ranks, capacity)


def random_policy(seed: int) -> Policy:
    """Build the control that ignores scores: a rank pattern drawn once, scaled to the limit.

    Site s grows at a rate drawn from an exponential distribution, until the next component would
    not fit. A smaller limit never gives a site more, and the same seed always gives the same
    pattern, whatever has been learned and however many events have passed.
    """

    def random_ranks(table: ComponentTable, limit: int) -> IntArray:
        check_feasible(table.sites, limit)
        rates = np.random.default_rng(seed).exponential(size=len(table.sites))
        rates /= 1024 * rates.sum()  # so slow that two births hardly ever share a level

        def grown_ranks(level: int) -> IntArray:
            grown = np.clip(level * rates, table.min_ranks, table.max_ranks)
            return grown.astype(np.int64)

        capacity = limit - table.fixed_cost
        return grown_ranks(_highest_level(grown_ranks, table.component_costs, capacity))

    return random_ranks


def frozen_policy(pattern: IntArray) -> Policy:
    """Build the policy that always returns the given ranks, e.g. those learned by an earlier run.

    Args:
        pattern: Rank of each site, shape ``(S,)``.

    Returns:
        A policy that raises a `BudgetError` if the pattern is not one of the table's sites, leaves
        their bounds, or costs more than the limit.
    """

    def frozen_ranks(table: ComponentTable, limit: int) -> IntArray:
        _check_pattern(table, pattern)
        cost = table.cost_of(pattern)
        if cost > limit:
            raise BudgetError(
                f"the frozen rank pattern costs {cost} parameters, but the budget is {limit}; "
                "raise the budget or use a smaller pattern"
            )
        return pattern.copy()

    return frozen_ranks


def _check_pattern(table: ComponentTable, pattern: IntArray) -> None:
    if len(pattern) != len(table.sites):
        raise BudgetError(
            f"the frozen rank pattern has {len(pattern)} ranks, but there are "
            f"{len(table.sites)} sites; give one rank for each"
        )
    for site, rank in zip(table.sites, pattern, strict=True):
        if not site.min_rank <= rank <= site.max_rank:
            raise BudgetError(
                f"the frozen rank pattern gives {site.name} rank {rank}, but it must lie between "
                f"{site.min_rank} and {site.max_rank}"
            )


def _check_scores(table: ComponentTable) -> None:
    wrong = np.flatnonzero(~(np.isfinite(table.scores) & (table.scores >= 0)))
    if wrong.size:
        site = table.sites[table.site_index[wrong[0]]]
        raise RankFlowError(
            f"scores must be finite and at least 0, but {site.name} has a component of score "
            f"{table.scores[wrong[0]]}; check the loss and the gradients for overflow"
        )


def _places(table: ComponentTable) -> IntArray:
    """Place of each component in its site by falling score, from 0, shape ``(C,)``."""
    _check_scores(table)
    best_first = np.argsort(-table.scores, kind="stable")
    places = np.empty(len(best_first), dtype=np.int64)
    places[best_first] = count_before(table.site_index[best_first])
    return places


def _optional(table: ComponentTable, places: IntArray) -> IntArray:
    """Indices of the components that the bounds neither force to stay nor to go."""
    site = table.site_index
    return np.flatnonzero((places >= table.min_ranks[site]) & (places < table.max_ranks[site]))


def _highest_level(
    ranks_at: Callable[[int], IntArray | FloatArray], costs: IntArray, capacity: int
) -> int:
    """Find the highest water level whose ranks fit; ranks must rise with the level."""
    return bisect_right(_LEVELS, capacity, key=lambda level: ceil(costs @ ranks_at(level))) - 1


def _level_out(costs: IntArray, lower: IntArray, upper: IntArray, capacity: int) -> IntArray:
    """Give each site the largest equal rank that fits; spread what is left, one component each.

    Taken by their multiple of the golden ratio, modulo 1, any number of sites is evenly spread over
    the depth, and follows no period: every seventh site would be the same kind in every block.
    """
    level = _highest_level(lambda rank: np.clip(rank, lower, upper), costs, capacity)
    ranks: IntArray = np.clip(level, lower, upper)
    next_up = np.flatnonzero(np.clip(level + 1, lower, upper) > ranks)
    spread = next_up[np.argsort(np.arange(len(next_up)) * _GOLDEN % 1)]
    ranks[take_in_order(spread, costs, capacity - int(costs @ ranks))] += 1
    return ranks
