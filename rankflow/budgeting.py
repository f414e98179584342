"""From a budget spec and the sites of a model to numbers: parameters, steps and start ranks."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankflow.allocation.policies import Policy, feasible_range, make_policy, uniform
from rankflow.allocation.pools import magnitudes_at, with_pools
from rankflow.allocation.scheduler import Scheduler
from rankflow.allocation.schedules import make_schedule
from rankflow.errors import BudgetError, SpecError
from rankflow.records import BoolArray, ComponentTable, IntArray, SiteInfo
from rankflow.specs.budget import BudgetSpec, match_pattern, resolve_steps

# Policies that look at no score; under a constant budget their ranks never change.
_BLIND = ("uniform", "random", "frozen")


@dataclass(frozen=True, slots=True)
class ResolvedBudget:
    """A budget spec in the units of one model and one run.

    Attributes:
        sites: The sites, with their bounds.
        target: Trainable adapter parameters allowed at the end.
        start: Trainable adapter parameters allowed at the first step.
        start_ranks: Rank of each site at the first step, shape ``(S,)``.
        start_magnitudes: Which sites train a magnitude at the first step, shape ``(S,)``.
        scheduler: Decides the events.
        is_static: Whether the start ranks are the final ones, so that no event is needed.
    """

    sites: tuple[SiteInfo, ...]
    target: int
    start: int
    start_ranks: IntArray
    start_magnitudes: BoolArray
    scheduler: Scheduler
    is_static: bool


def check_arguments(budget: BudgetSpec, total_steps: int) -> None:
    """Check that a budget and the length of a run are of the types that they should be.

    Raises:
        SpecError: The budget is something else.
        BudgetError: The steps are no positive whole number.
    """
    if not isinstance(budget, BudgetSpec):
        raise SpecError(
            f"budget must be a BudgetSpec, received {type(budget).__name__}; "
            'use rankflow.load_budget("reallocate", rank=8) or another preset'
        )
    if not isinstance(total_steps, int) or total_steps < 1:
        raise BudgetError(
            f"total_steps must be a positive whole number of optimizer steps, received "
            f"{total_steps!r}"
        )


def resolve_budget(
    spec: BudgetSpec,
    sites: Sequence[SiteInfo],
    *,
    total_steps: int,
    base_parameters: int,
    bytes_per_parameter: int,
) -> ResolvedBudget:
    """Resolve a budget spec for a model.

    Args:
        spec: The budget.
        sites: The model's sites, with the bounds that the spec gives them.
        total_steps: Optimizer steps of the whole run.
        base_parameters: Parameters of the base model, for a target given as a fraction.
        bytes_per_parameter: Bytes of one adapter parameter, for a target given in bytes.

    Raises:
        BudgetError: The budget is below the minimum ranks or above what the sites can hold, a
            pattern matches no site, no site has a magnitude to budget, or the steps leave no room
            to reallocate.
    """
    pools = with_pools(sites)
    check_patterns("bounds", spec.bounds, sites)
    check_patterns("ranks", spec.ranks, pools)
    target = target_parameters(spec, sites, base_parameters, bytes_per_parameter)
    start = int(target * spec.start)
    if spec.magnitude == "budgeted" and len(pools) == len(sites):
        raise BudgetError(
            "magnitude = 'budgeted' needs DoRA's magnitudes, and this adapter has none; make it "
            "with LoraConfig(use_dora=True) (in a run spec, use_dora = true under [adapter]), or "
            "leave the key out"
        )
    given = "{} = {:g}".format(*spec.target)
    _check_range(given, "target", pools, target)
    _check_range(f"{given}, start = {spec.start:g}", "start", pools, start)
    scheduler = _make_scheduler(spec, sites, pools, start, target, total_steps)
    is_static = spec.schedule == "constant" and spec.policy in _BLIND
    if spec.policy == "frozen":  # it must also fit the least budget of the run
        frozen = _start_ranks(scheduler.policy, pools, min(start, target))
        if not frozen.any() and not any(site.fixed_cost for site in pools):
            raise BudgetError("ranks: all are 0, so that nothing is trained; give a site a rank")
    if spec.policy in _BLIND:
        start_ranks = _start_ranks(scheduler.policy, pools, start)
    else:
        start_ranks = _start_ranks(uniform, _with_all_magnitudes(sites, pools, start), start)
    return ResolvedBudget(
        sites=tuple(sites),
        target=target,
        start=start,
        start_ranks=start_ranks[: len(sites)],
        start_magnitudes=magnitudes_at(start_ranks, sites),
        scheduler=scheduler,
        is_static=is_static,
    )


def _with_all_magnitudes(
    sites: Sequence[SiteInfo], pools: Sequence[SiteInfo], start: int
) -> Sequence[SiteInfo]:
    """Hold all magnitudes on, as DoRA does, if the start budget allows it."""
    held = [*sites, *(replace(pool, min_rank=1) for pool in pools[len(sites) :])]
    return held if feasible_range(held)[0] <= start else pools


def target_parameters(
    spec: BudgetSpec, sites: Sequence[SiteInfo], base_parameters: int, bytes_per_parameter: int
) -> int:
    """Return the trainable adapter parameters that a budget's target stands for.

    Args:
        spec: The budget.
        sites: All sites of the adapter.
        base_parameters: Parameters of the base model, for a target given as a fraction.
        bytes_per_parameter: Bytes of one adapter parameter, for a target given in bytes.
    """
    key, value = spec.target
    match key:
        case "rank":
            return int(value * sum(site.plain_cost for site in sites))
        case "params":
            return int(value)
        case "fraction":
            return int(value * base_parameters)
        case "bytes":
            return int(value // bytes_per_parameter)


def _check_range(given: str, name: str, sites: Sequence[SiteInfo], limit: int) -> None:
    lowest, highest = feasible_range(sites)
    lowest = max(lowest, min(site.fixed_cost or site.component_cost for site in sites))
    if not lowest <= limit <= highest:
        raise BudgetError(
            f"{given}: the {name} budget of {limit:,} parameters is out of reach: the "
            f"{len(sites)} sites need at least {lowest:,} (their minimum ranks and magnitudes) "
            f"and hold at most {highest:,} (their maximum ranks); choose a budget in between, or "
            "other bounds"
        )


def check_patterns(key: str, patterns: Iterable[str], sites: Sequence[SiteInfo]) -> None:
    """Check that every pattern of a budget's key speaks of a site.

    Raises:
        BudgetError: One matches none.
    """
    for pattern in patterns:
        if not any(match_pattern([pattern], site.name) for site in sites):
            raise BudgetError(
                f"the pattern {pattern!r} in {key} matches none of the {len(sites)} sites; "
                f"the first is {sites[0].name!r}"
            )


def _make_scheduler(
    spec: BudgetSpec,
    sites: Sequence[SiteInfo],
    pools: Sequence[SiteInfo],
    start: int,
    target: int,
    total_steps: int,
) -> Scheduler:
    warmup = resolve_steps(spec.warmup, total_steps)
    cooldown = resolve_steps(spec.cooldown, total_steps)
    schedule = make_schedule(
        spec.schedule,
        start=start,
        target=target,
        total_steps=total_steps,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        stages=spec.stages,
    )
    pattern = frozen_ranks(spec.ranks, sites, pools) if spec.policy == "frozen" else None
    return Scheduler(
        policy=make_policy(spec.policy, seed=spec.seed, pattern=pattern),
        budget_at=schedule,
        total_steps=total_steps,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        every=resolve_steps(spec.every, total_steps),
        recycle=spec.recycle,
        hysteresis=spec.hysteresis,
        protect=spec.protect,
    )


def frozen_ranks(
    ranks: dict[str, int], sites: Sequence[SiteInfo], pools: Sequence[SiteInfo]
) -> IntArray:
    """Return the frozen rank of each site and pool; a magnitude that is not named stays on.

    Args:
        ranks: Ranks by pattern.
        sites: The S sites.
        pools: The sites, and behind them the pools of their budgeted magnitudes.

    Raises:
        BudgetError: No pattern matches a site.
    """
    frozen = []
    for site in sites:
        pattern = match_pattern(ranks, site.name)
        if pattern is None:
            raise BudgetError(
                f"the frozen ranks say nothing of site {site.name!r}; give every site a rank "
                "(0 leaves it untouched)"
            )
        frozen.append(ranks[pattern])
    # A pattern that also matches a site, such as ".*", gives ranks and no magnitudes.
    named = [key for key in ranks if not any(match_pattern([key], site.name) for site in sites)]
    for pool in pools[len(sites) :]:
        pattern = match_pattern(named, pool.name)
        frozen.append(1 if pattern is None else ranks[pattern])
    return np.array(frozen, dtype=np.int64)


def even_ranks(sites: Sequence[SiteInfo], limit: int) -> IntArray:
    """Return the equal ranks that a number of parameters allows, shape ``(S,)``."""
    return _start_ranks(uniform, sites, limit)


def _start_ranks(policy: Policy, sites: Sequence[SiteInfo], start: int) -> IntArray:
    empty = ComponentTable(
        sites=tuple(sites),
        ranks=np.zeros(len(sites), dtype=np.int64),
        scores=np.zeros(0),
        ages=np.zeros(0, dtype=np.int64),
        demand=np.zeros(len(sites)),
    )
    return policy(empty, start)
