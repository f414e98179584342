"""Bring an adapter to where a run begins: what its sites need, and then their first ranks."""

from collections.abc import Sequence
from functools import partial

from peft import PeftModel

from rankflow.adapters import gating
from rankflow.adapters.base_weight import count_base_parameters
from rankflow.adapters.sites import Site
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.vera import draw_matrices, share_matrices
from rankflow.budgeting import ResolvedBudget, resolve_budget
from rankflow.growing import Growth
from rankflow.resizing.resizer import Resizer
from rankflow.specs.budget import BudgetSpec


def prepare(
    model: PeftModel,
    sites: Sequence[Site],
    budget: BudgetSpec,
    total_steps: int,
    resizer: Resizer,
    *,
    accelerate: bool,
) -> ResolvedBudget:
    """Resolve a budget for an adapter, and give its sites what they need at any rank.

    Args:
        model: The model.
        sites: Its sites, which have the budget's kind of components already.
        budget: The budget.
        total_steps: Optimizer steps of the whole run.
        resizer: Knows which ranks and which fast forward of DoRA the sites can take.
        accelerate: Whether DoRA sites get that forward.

    Raises:
        BudgetError: The budget does not fit the sites or the steps.
    """
    resolved = _resolve(model, sites, budget, total_steps, resizer)
    if budget.components == "vera":
        largest = max(info.max_rank for info in resolved.sites)
        share_matrices(sites, draw_matrices(sites, largest, budget.seed))
    for site in sites:
        translate_state_dicts(site.layer, site.adapter_name)
        if accelerate and site.magnitude_slot is not None:
            resizer.accelerate(site)
    return resolved


def begin(
    sites: Sequence[Site],
    budget: BudgetSpec,
    resolved: ResolvedBudget,
    resizer: Resizer,
    growth: Growth,
    *,
    is_new: bool,
) -> None:
    """Bring the sites to the ranks and magnitudes of the first step.

    Args:
        sites: The sites.
        budget: The budget.
        resolved: What ``prepare`` returned.
        resizer: Changes their ranks.
        growth: Draws what components start from.
        is_new: Whether the sites have just been converted to the budget's kind of components.
    """
    ranks, magnitudes = resolved.start_ranks, resolved.start_magnitudes
    resizer.begin(resolved.sites, ranks, magnitudes, growth.newborns(0))
    if is_new:
        gating.start_components(sites, budget.components, growth.newborns(0).generator)


def _resolve(
    model: PeftModel, sites: Sequence[Site], budget: BudgetSpec, total_steps: int, resizer: Resizer
) -> ResolvedBudget:
    infos = [
        site.describe(*budget.bounds_of(site.name), magnitude=budget.magnitude) for site in sites
    ]
    within = partial(
        resolve_budget,
        budget,
        total_steps=total_steps,
        base_parameters=count_base_parameters(model),
        bytes_per_parameter=sites[0].A.element_size(),
    )
    return resizer.resolve(infos, within)
