r"""Which components of a whole adapter stay, under a budget or for an error.

The error of an adapter is one number over all sites,

.. math:: \varepsilon = \sqrt{\frac{\sum_i \lVert W'_i - W^\star_i \rVert_F^2}
    {\sum_i \lVert W^\star_i - W_i \rVert_F^2}},

with the base weight W, the adapted weight :math:`W^\star` and the compressed one W'. For LoRA the
numerator is the sum of the energies of what is left out, so keeping the greatest within a budget is
a knapsack, and its solution the least error that any adapter of that many parameters can have.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from rankflow.allocation.policies import (
    allocate_knapsack,
    check_feasible,
    feasible_range,
    make_policy,
    plan_from_ranks,
    uniform,
)
from rankflow.budgeting import check_patterns, frozen_ranks
from rankflow.errors import BudgetError
from rankflow.export.decompose import Decomposition, squared_error
from rankflow.records import ComponentTable, CurvePoint, FloatArray, IntArray, SiteInfo
from rankflow.specs.budget import BudgetSpec

_CURVE_POINTS: Final = 24
# Branch and bound takes a second for so many and minutes for ten times as many, where the greedy
# solution is short of the best by less than one of them.
_EXACTLY_SOLVED: Final = 5_000
_PRESCRIBED: Final = ("uniform", "random", "frozen")
"""Policies that look at no score."""


@dataclass(frozen=True, slots=True)
class Candidates:
    """An adapter, taken apart.

    Attributes:
        sites: Its S sites, with bounds that their components can meet.
        parts: Their components.
        table: The components with their scores.
    """

    sites: tuple[SiteInfo, ...]
    parts: tuple[Decomposition, ...]
    table: ComponentTable

    @property
    def change(self) -> float:
        """Squared norm of what the adapter changes, over all sites."""
        return sum(part.change for part in self.parts)

    def cost(self, ranks: Sequence[int]) -> int:
        """Parameters at these ranks, magnitudes included."""
        return self.table.cost_of(np.array(ranks, dtype=np.int64))

    def squared_errors(self, keep: Sequence[IntArray]) -> FloatArray:
        """Squared error of each site, shape ``(S,)``, if these of its components stay."""
        return np.array([squared_error(p, k) for p, k in zip(self.parts, keep, strict=True)])

    def error(self, keep: Sequence[IntArray]) -> float:
        """Relative error of the whole adapter; 0 where it changes nothing."""
        return relative(float(self.squared_errors(keep).sum()), self.change)


def relative(squared: float, change: float) -> float:
    """Relate a squared error to a squared change.

    >>> relative(1.0, 4.0), relative(0.0, 0.0)
    (0.5, 0.0)
    """
    return float(np.sqrt(squared / change)) if change > 0 else 0.0


def tabulate(
    sites: Sequence[SiteInfo], parts: Sequence[Decomposition], scores: Sequence[FloatArray]
) -> Candidates:
    """Line the components up for an allocation policy.

    Args:
        sites: The sites, with the bounds that a budget gives them.
        parts: Their components.
        scores: What each component is worth, an array ``(k,)`` a site.
    """
    bounded = tuple(
        replace(
            site,
            has_magnitude=part.rows is not None,
            min_rank=min(site.min_rank, len(part.energies)),
            max_rank=min(site.max_rank, len(part.energies)),
        )
        for site, part in zip(sites, parts, strict=True)
    )
    ranks = np.array([len(part.energies) for part in parts], dtype=np.int64)
    table = ComponentTable(
        sites=bounded,
        ranks=ranks,
        scores=np.concatenate([*scores, np.zeros(0)]),
        ages=np.zeros(ranks.sum(), dtype=np.int64),
        demand=np.zeros(len(bounded)),
    )
    return Candidates(bounded, tuple(parts), table)


def choose(candidates: Candidates, limit: int, spec: BudgetSpec | None) -> tuple[IntArray, ...]:
    """Choose the components that stay within a limit.

    Args:
        candidates: The adapter.
        limit: Parameters allowed, magnitudes included.
        spec: The budget; a policy of it that prescribes ranks is followed, any other is the
            knapsack, as it is without a spec: exact, but for adapters of many thousand components.

    Returns:
        For each site the ascending indices of what stays.

    Raises:
        BudgetError: The limit is below what the bounds demand, or buys no component.
    """
    table = candidates.table
    _check_limit(table.sites, limit)
    if spec is None or spec.policy not in _PRESCRIBED:
        exact = len(table.scores) <= _EXACTLY_SOLVED
        return plan_from_ranks(table, allocate_knapsack(table, limit, exact=exact).ranks).keep
    pattern = None
    if spec.policy == "frozen":
        check_patterns("ranks", spec.ranks, table.sites)
        pattern = frozen_ranks(spec.ranks, table.sites, table.sites)
    ranks = make_policy(spec.policy, seed=spec.seed, pattern=pattern)(table, limit)
    return plan_from_ranks(table, ranks).keep


def smallest(candidates: Candidates, error: float) -> tuple[IntArray, ...]:
    """Choose as few parameters as keep the error within a bound.

    Args:
        candidates: The adapter.
        error: The largest relative error allowed, at least 0.

    Raises:
        BudgetError: Even all components together miss by more.
    """
    lowest, highest = _reach(candidates.table.sites)
    everything = choose(candidates, highest, None)
    least = candidates.error(everything)
    if error < least:
        raise BudgetError(
            f"an error of {error:g} is out of reach: all components together miss the adapter by "
            f"{least:.4g}; allow that much, or keep the magnitudes"
        )
    unit = int(np.gcd.reduce(candidates.table.component_costs))
    limits = range(lowest, highest, unit)
    found = bisect_left(
        limits, True, key=lambda limit: candidates.error(choose(candidates, limit, None)) <= error
    )
    return choose(candidates, limits[found], None) if found < len(limits) else everything


def trace(candidates: Candidates, energies: Candidates) -> tuple[CurvePoint, ...]:
    """Follow the error from the smallest budget to the whole adapter.

    Args:
        candidates: The adapter.
        energies: The same with energies as scores, for the uniform ranks to compare with.
    """
    lowest, highest = _reach(candidates.table.sites)
    limits = np.unique(np.linspace(lowest, highest, _CURVE_POINTS).round().astype(np.int64))
    return tuple(_point(candidates, energies, int(limit)) for limit in limits)


def _point(candidates: Candidates, energies: Candidates, limit: int) -> CurvePoint:
    best = plan_from_ranks(candidates.table, allocate_knapsack(candidates.table, limit).ranks)
    even = plan_from_ranks(energies.table, uniform(energies.table, limit))
    return CurvePoint(limit, candidates.error(best.keep), energies.error(even.keep))


def _reach(sites: Sequence[SiteInfo]) -> tuple[int, int]:
    """Parameters of the smallest adapter that is one, and of the largest."""
    lowest, highest = feasible_range(sites)
    cheapest = min(site.fixed_cost or site.component_cost for site in sites if _is_alive(site))
    return max(lowest, cheapest), highest


def _is_alive(site: SiteInfo) -> bool:
    return site.max_rank > 0 or site.fixed_cost > 0


def _check_limit(sites: Sequence[SiteInfo], limit: int) -> None:
    check_feasible(sites, limit)
    lowest, _ = _reach(sites)
    if limit < lowest:
        raise BudgetError(
            f"a budget of {limit:,} parameters buys no component, and the cheapest costs "
            f"{lowest:,}; raise it"
        )
