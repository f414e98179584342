"""Resize adapters and their optimizer state physically; no other module changes a shape.

One event is validated as a whole, built as a whole beside the living model, and then committed by
assignments alone; if anything raises, model and optimizer are put back as they were.

Parameters are replaced by new ``nn.Parameter`` objects inside the existing ``param_groups`` and
``optimizer.state``: resizing ``.data`` fails while an older graph lives, and a parameter that is
not re-keyed never moves again, with no error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.adapters.newborns import Newborns
from rankflow.adapters.rebuild import grow, rebuild_factors, rebuild_magnitude
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site, magnitudes_on
from rankflow.errors import SurgeryError
from rankflow.records import IntArray, RankPlan
from rankflow.specs.budget import Renormalise

# Factored second moments (Adafactor) and the axis of the parameter that each lacks, counted from
# the end; torch keeps the lacking axis with size 1, transformers drops it.
_FACTORED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}


@dataclass(frozen=True, slots=True)
class _Replacement:
    """One parameter and what takes its place."""

    old: nn.Parameter
    new: nn.Parameter
    state: dict[str, Any] | None  # None: the optimizer has no state, or starts afresh
    group: tuple[int, int] | None  # param_groups index and position


@dataclass(frozen=True, slots=True)
class _SiteChange:
    """What changes at one site, by the names of ``Site.install``."""

    site: Site
    replacements: dict[str, _Replacement]

    def install(self) -> None:
        """Put the new parameters into the site."""
        self.site.install(**{name: r.new for name, r in self.replacements.items()})


@dataclass(frozen=True, slots=True)
class _SitePlan:
    """A plan's part for one site."""

    index: int
    site: Site
    keep: IntArray
    births: int
    magnitude: bool  # whether the site trains one afterwards

    @property
    def changes_rank(self) -> bool:
        return len(self.keep) < self.site.rank or self.births > 0

    @property
    def changes_magnitude(self) -> bool:
        return self.magnitude != (self.site.magnitude is not None)


def resize(
    sites: Sequence[Site],
    plan: RankPlan,
    optimizer: Optimizer | None,
    newborns: Newborns,
    renormalise: Renormalise = "none",
) -> None:
    """Carry out a plan on the sites and on the optimizer's state, wholly or not at all.

    Survivors keep their values and their optimizer state. A newborn's row of A is drawn, with the
    norm of PEFT's own initialisation, and its column of B is zero, so the function stays what it
    was (for embeddings the roles are swapped, as in PEFT; with a gate, that is zero instead). A
    magnitude that is turned on starts at the norm, which changes nothing either.

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        optimizer: The optimizer that trains the adapters, or None if there is none.
        newborns: Draws the newborns' rows of A.
        renormalise: What a magnitude does when its site loses components; see ``BudgetSpec``.

    Raises:
        SurgeryError: The plan does not fit the sites, or the optimizer holds state that cannot be
            resized; nothing was changed.
    """
    parts = _split_plan(sites, plan)
    places = {} if optimizer is None else _places(optimizer)
    changes = [
        _build(part, optimizer, places, newborns, renormalise)
        for part in parts
        if part.changes_rank or part.changes_magnitude
    ]
    _commit(changes, optimizer)


def resize_in_place(
    sites: Sequence[Site],
    plan: RankPlan,
    newborns: Newborns,
    renormalise: Renormalise = "none",
) -> None:
    """Carry out a plan before training, keeping the identity of every parameter.

    An optimizer made earlier goes on holding the same objects. It must not have taken a step yet.

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        newborns: Draws the newborns' rows of A.
        renormalise: What a magnitude does when its site loses components; see ``BudgetSpec``.

    Raises:
        SurgeryError: The plan does not fit the sites.
    """
    for part in _split_plan(sites, plan):
        if not (part.changes_rank or part.changes_magnitude):
            continue
        parameters = part.site.named_parameters
        for name, data in _rebuild(part, newborns, renormalise).items():
            parameters[name].grad = None
            parameters[name].data = data
        part.site.install(**parameters)


def replace(sites: Sequence[Site], tensors: Sequence[Mapping[str, Tensor]]) -> None:
    """Put other tensors of any rank in the place of the sites' own, wholly or not at all.

    An optimizer made before does not train them.

    Args:
        sites: The sites.
        tensors: For each site its new A and B and, if that changes, its magnitude, by the names of
            ``Site.install``; an empty magnitude turns it off.
    """
    changes = []
    for site, named in zip(sites, tensors, strict=True):
        old = site.named_parameters
        replacements = {
            name: _Replacement(old[name], _like(old[name], new), None, None)
            for name, new in named.items()
        }
        changes.append(_SiteChange(site, replacements))
    _commit(changes, None)


def adopt_gate(site: Site, optimizer: Optimizer) -> None:
    """Let an optimizer that was made before a site got its gates train them, in the group of B.

    They come to stand where an optimizer made afterwards has them, and factors that are frozen now
    go, so that their states match.

    Args:
        site: The site; without a gate nothing happens.
        optimizer: The optimizer that trains A and B; it must not have taken a step yet.

    Raises:
        SurgeryError: The optimizer has trained the site without its gate.
    """
    places = _places(optimizer)
    if site.gate is None or site.gate in places or site.B not in places:
        return
    if optimizer.state.get(site.B):
        raise SurgeryError(
            f"the optimizer has taken steps without the gates of site {site.name!r}; make it after "
            "RankFlow, or call flow.attach(optimizer) before its first step"
        )
    group, _ = places[site.B]
    before = [p for p in site.named_parameters.values() if p in places and places[p][0] == group]
    last = max(places[p][1] for p in before)
    gates = [site.gate] if site.row_gate is None else [site.gate, site.row_gate]
    params = optimizer.param_groups[group]["params"]
    params[last + 1 : last + 1] = gates
    frozen = [factor for factor in (site.A, site.B) if not factor.requires_grad]
    params[:] = [p for p in params if not any(p is factor for factor in frozen)]


def check_state(site: Site, optimizer: Optimizer) -> None:
    """Check that the optimizer's state has the shapes of the site's factors.

    A fused optimizer does not check them, and would write beyond the state's memory.

    Args:
        site: The site.
        optimizer: The optimizer that trains it.

    Raises:
        SurgeryError: The optimizer has taken steps while the site had another rank.
    """
    for parameter, _ in site.factors:
        for key, value in optimizer.state.get(parameter, {}).items():
            is_whole = isinstance(value, Tensor) and value.ndim > 0 and key not in _FACTORED
            if is_whole and value.numel() > 1 and value.shape != parameter.shape:
                raise SurgeryError(
                    f"the optimizer has trained site {site.name!r} at another rank: its state "
                    f"{key!r} has shape {tuple(value.shape)}, and the parameter "
                    f"{tuple(parameter.shape)}; begin with a new optimizer, and in a Trainer with "
                    "a new Trainer"
                )


def _split_plan(sites: Sequence[Site], plan: RankPlan) -> list[_SitePlan]:
    """Check a plan against the sites, and hand out its parts."""
    magnitudes = magnitudes_on(sites) if plan.magnitudes is None else plan.magnitudes
    if not len(sites) == len(plan.keep) == len(plan.births) == len(magnitudes):
        raise SurgeryError(
            f"the plan speaks of {len(plan.keep)} sites and the model has {len(sites)}"
        )
    parts = [
        _SitePlan(index, site, keep, int(births), bool(on))
        for index, (site, keep, births, on) in enumerate(
            zip(sites, plan.keep, plan.births, magnitudes, strict=True)
        )
    ]
    for part in parts:
        _check_part(part)
    return parts


def _check_part(part: _SitePlan) -> None:
    site, keep, births = part.site, part.keep, part.births
    valid = bool(
        births >= 0 and (keep[:-1] < keep[1:]).all() and ((keep >= 0) & (keep < site.rank)).all()
    )
    if not valid:
        raise SurgeryError(
            f"the plan for site {site.name!r} of rank {site.rank} is not valid: "
            f"keep {keep.tolist()}, births {births}; indices must ascend within the rank"
        )
    largest = min(site.in_features, site.out_features)
    if len(keep) + births > largest:
        raise SurgeryError(
            f"site {site.name!r} cannot hold rank {len(keep) + births}: "
            f"its matrix has rank {largest} at most"
        )
    if part.magnitude and site.magnitude_slot is None:
        raise SurgeryError(
            f"the plan gives site {site.name!r} a magnitude, and its adapter is plain LoRA; "
            "make it with LoraConfig(use_dora=True)"
        )


def _places(optimizer: Optimizer) -> dict[nn.Parameter, tuple[int, int]]:
    return {
        parameter: (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }


def _build(
    part: _SitePlan,
    optimizer: Optimizer | None,
    places: dict[nn.Parameter, tuple[int, int]],
    newborns: Newborns,
    renormalise: Renormalise,
) -> _SiteChange:
    site = part.site
    parameters = site.named_parameters
    axes = {id(factor): axis for factor, axis in site.factors}
    replacements = {}
    for name, data in _rebuild(part, newborns, renormalise).items():
        old = parameters[name]
        if id(old) in axes:
            state = _factor_state(part, old, axes[id(old)], optimizer)
        elif optimizer is None or part.changes_magnitude:
            state = None  # a magnitude that goes, or comes anew, has no moments
        else:
            state = optimizer.state.get(old)
        replacements[name] = _replace(site, old, data, state, optimizer, places)
    return _SiteChange(site, replacements)


def _rebuild(part: _SitePlan, newborns: Newborns, renormalise: Renormalise) -> dict[str, Tensor]:
    """Return what the site's parameters become, by name; one that is missing stays."""
    site = part.site
    draw = partial(newborns.rows, part.index)
    factors = rebuild_factors(site, part.keep, part.births, draw, newborns.generator)
    magnitude = rebuild_magnitude(
        site,
        factors,
        turn_on=part.magnitude,
        keep_scale=renormalise == "keep-scale" and len(part.keep) < site.rank,
    )
    return factors if magnitude is None else factors | {"magnitude": magnitude}


def _replace(
    site: Site,
    old: nn.Parameter,
    data: Tensor,
    state: dict[str, Any] | None,
    optimizer: Optimizer | None,
    places: dict[nn.Parameter, tuple[int, int]],
) -> _Replacement:
    new = _like(old, data)
    if optimizer is not None and old.requires_grad and old not in places:
        raise SurgeryError(
            f"the optimizer does not train the adapter of site {site.name!r}; build it from "
            "the model's trainable parameters, and pass flow.step() that optimizer"
        )
    return _Replacement(old, new, state, places.get(old))


def _like(old: nn.Parameter, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=old.requires_grad)


def _factor_state(
    part: _SitePlan, old: nn.Parameter, rank_axis: int, optimizer: Optimizer | None
) -> dict[str, Any] | None:
    state = None if optimizer is None else optimizer.state.get(old)
    if not state or len(part.keep) == 0:
        return None
    kept = torch.as_tensor(part.keep, device=old.device)
    return {
        key: _resize_state(part.site, key, value, old, rank_axis, kept, part.births)
        for key, value in state.items()
    }


def _resize_state(
    site: Site,
    key: str,
    value: Any,
    parameter: nn.Parameter,
    rank_axis: int,
    kept: Tensor,
    births: int,
) -> Any:
    """Slice one entry of a parameter's state along the rank and pad it for the newborns."""
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if key in _FACTORED:
        lacking = _FACTORED[key] % parameter.ndim
        if lacking == rank_axis:
            return value
        dropped = value.ndim < parameter.ndim
        axis = rank_axis - (1 if dropped and lacking < rank_axis else 0)
        survivors = value.index_select(axis, kept)
        # A newborn with no second moment would take a step sqrt(1 / (1 - beta2)) times too long.
        mean = survivors.mean(dim=axis, keepdim=True)
        return torch.cat([survivors, *[mean] * births], dim=axis)
    if value.shape == parameter.shape and value.is_floating_point():
        return grow(value.index_select(rank_axis, kept), rank_axis, births)
    if value.numel() == 1:
        return value
    raise SurgeryError(
        f"the optimizer's state {key!r} for site {site.name!r} has shape {tuple(value.shape)} and "
        f"type {value.dtype}, but the parameter has shape {tuple(parameter.shape)}: it cannot be "
        "resized. Use AdamW, SGD, Adafactor, or another optimizer whose state is not quantised and "
        "has the parameter's shape"
    )


def _commit(changes: Sequence[_SiteChange], optimizer: Optimizer | None) -> None:
    before = Savepoint([change.site for change in changes], optimizer=optimizer)
    try:
        for change in changes:
            change.install()
            for replacement in change.replacements.values():
                _rekey(optimizer, replacement)
    except BaseException:
        before.restore()
        raise


def _rekey(optimizer: Optimizer | None, replacement: _Replacement) -> None:
    if optimizer is None:
        return
    if replacement.group is not None:
        group, position = replacement.group
        optimizer.param_groups[group]["params"][position] = replacement.new
    optimizer.state.pop(replacement.old, None)
    if replacement.state is not None:
        optimizer.state[replacement.new] = replacement.state
