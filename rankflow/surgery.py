"""Resize adapters and their optimizer state physically; no other module changes a shape.

One event is validated as a whole, built as a whole beside the living model, and then committed by
assignments alone; if anything raises, model and optimizer are put back as they were.

Parameters are replaced by new ``nn.Parameter`` objects inside the existing ``param_groups`` and
``optimizer.state``: resizing ``.data`` fails while an older graph lives, and a parameter that is
not re-keyed never moves again, with no error.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.adapters.gating import draw_components
from rankflow.adapters.sites import Site
from rankflow.errors import SurgeryError
from rankflow.records import IntArray, RankPlan

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
    site: Site
    factors: tuple[_Replacement, ...]


def resize(
    sites: Sequence[Site], plan: RankPlan, optimizer: Optimizer | None, generator: torch.Generator
) -> None:
    """Carry out a plan on the sites and on the optimizer's state, wholly or not at all.

    Survivors keep their values and their optimizer state. A newborn's row of A is orthogonal to the
    site's live rows and has the norm of PEFT's own initialisation, and its column of B is zero, so
    the function stays what it was (for embeddings the roles are swapped, as in PEFT). With gates
    both are drawn as at the start of training, and the gate is zero.

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        optimizer: The optimizer that trains the adapters, or None if there is none.
        generator: A CPU generator for the newborns' directions.

    Raises:
        SurgeryError: The plan does not fit the sites, or the optimizer holds state that cannot be
            resized; nothing was changed.
    """
    _check_plan(sites, plan)
    places = {} if optimizer is None else _places(optimizer)
    changes = [
        _build(site, keep, int(births), optimizer, places, generator)
        for site, keep, births in zip(sites, plan.keep, plan.births, strict=True)
        if len(keep) < site.rank or births > 0
    ]
    _commit(changes, optimizer)


def resize_in_place(sites: Sequence[Site], plan: RankPlan, generator: torch.Generator) -> None:
    """Carry out a plan before training, keeping the identity of every parameter.

    An optimizer made earlier goes on holding the same objects. It must not have taken a step yet.

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        generator: A CPU generator for the newborns' directions.

    Raises:
        SurgeryError: The plan does not fit the sites.
    """
    _check_plan(sites, plan)
    for site, keep, births in zip(sites, plan.keep, plan.births, strict=True):
        if len(keep) == site.rank and births == 0:
            continue
        parameters = [parameter for parameter, _ in site.factors]
        new = _new_factors(site, keep, int(births), generator)
        for parameter, data in zip(parameters, new, strict=True):
            parameter.grad = None
            parameter.data = data
        site.install(*parameters)


def adopt_gate(site: Site, optimizer: Optimizer) -> None:
    """Let an optimizer that was made before a site got its gate train it, in the group of B.

    The gate comes to stand where an optimizer made afterwards has it, so that their states match.

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
    before = [site.A, site.B] if site.magnitude is None else [site.A, site.B, site.magnitude]
    last = max(places[p][1] for p in before if p in places and places[p][0] == group)
    optimizer.param_groups[group]["params"].insert(last + 1, site.gate)


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


def _check_plan(sites: Sequence[Site], plan: RankPlan) -> None:
    if not len(sites) == len(plan.keep) == len(plan.births):
        raise SurgeryError(
            f"the plan speaks of {len(plan.keep)} sites and the model has {len(sites)}"
        )
    for site, keep, births in zip(sites, plan.keep, plan.births, strict=True):
        valid = bool(
            births >= 0
            and (keep[:-1] < keep[1:]).all()
            and ((keep >= 0) & (keep < site.rank)).all()
        )
        if not valid:
            raise SurgeryError(
                f"the plan for site {site.name!r} of rank {site.rank} is not valid: "
                f"keep {keep.tolist()}, births {int(births)}; indices must ascend within the rank"
            )
        largest = min(site.in_features, site.out_features)
        if len(keep) + births > largest:
            raise SurgeryError(
                f"site {site.name!r} cannot hold rank {len(keep) + int(births)}: "
                f"its matrix has rank {largest} at most"
            )


def _places(optimizer: Optimizer) -> dict[nn.Parameter, tuple[int, int]]:
    return {
        parameter: (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }


def _build(
    site: Site,
    keep: IntArray,
    births: int,
    optimizer: Optimizer | None,
    places: dict[nn.Parameter, tuple[int, int]],
    generator: torch.Generator,
) -> _SiteChange:
    new = _new_factors(site, keep, births, generator)
    replacements = (
        _replace(site, old, data, axis, keep, births, optimizer, places)
        for (old, axis), data in zip(site.factors, new, strict=True)
    )
    return _SiteChange(site, tuple(replacements))


def _replace(
    site: Site,
    old: nn.Parameter,
    data: Tensor,
    rank_axis: int,
    keep: IntArray,
    births: int,
    optimizer: Optimizer | None,
    places: dict[nn.Parameter, tuple[int, int]],
) -> _Replacement:
    new = nn.Parameter(data, requires_grad=old.requires_grad)
    if optimizer is None:
        return _Replacement(old, new, None, None)
    if old not in places:
        if old.requires_grad:
            raise SurgeryError(
                f"the optimizer does not train the adapter of site {site.name!r}; build it from "
                "the model's trainable parameters, and pass flow.step() that optimizer"
            )
        return _Replacement(old, new, None, None)
    state = optimizer.state.get(old)
    resized = None
    if state and len(keep) > 0:
        kept = torch.as_tensor(keep, device=old.device)
        resized = {
            key: _resize_state(site, key, value, old, rank_axis, kept, births)
            for key, value in state.items()
        }
    return _Replacement(old, new, resized, places[old])


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
        return _grow(value.index_select(rank_axis, kept), rank_axis, births)
    if value.numel() == 1:
        return value
    raise SurgeryError(
        f"the optimizer's state {key!r} for site {site.name!r} has shape {tuple(value.shape)} and "
        f"type {value.dtype}, but the parameter has shape {tuple(parameter.shape)}: it cannot be "
        "resized. Use AdamW, SGD, Adafactor, or another optimizer whose state is not quantised and "
        "has the parameter's shape"
    )


def _grow(value: Tensor, axis: int, births: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = births
    return torch.cat([value, value.new_zeros(shape)], dim=axis)


def _new_factors(
    site: Site, keep: IntArray, births: int, generator: torch.Generator
) -> tuple[Tensor, ...]:
    """Return the site's factors with the kept components followed by the newborns."""
    kept = torch.as_tensor(keep, device=site.A.device)
    survivors = tuple(factor.detach().index_select(axis, kept) for factor, axis in site.factors)
    if births == 0:
        return survivors
    if site.gate is not None:
        return _with_gated_newborns(site, survivors, births, generator)
    A, B = survivors
    if site.kind == "embedding":  # PEFT starts embeddings at A = 0 and B of standard deviation 1
        columns = orthogonal_rows(B.flatten(1).T, births, math.sqrt(B.shape[0]), generator)
        return _grow(A, 0, births), torch.cat([B, columns.T], dim=1)
    # PEFT draws A from U(-1/sqrt(in), 1/sqrt(in)): rows of norm 1/sqrt(3).
    rows = orthogonal_rows(A.flatten(1), births, 1 / math.sqrt(3), generator)
    return torch.cat([A, rows.view(births, *A.shape[1:])]), _grow(B, 1, births)


def _with_gated_newborns(
    site: Site, survivors: Sequence[Tensor], births: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    A, B, gate = survivors
    new_A, new_B = draw_components(site, births, len(gate) + births, generator)
    return torch.cat([A, new_A]), torch.cat([B, new_B], dim=1), _grow(gate, 0, births)


def orthogonal_rows(live: Tensor, births: int, norm: float, generator: torch.Generator) -> Tensor:
    """Draw rows orthogonal to the live ones and to each other.

    Args:
        live: Live rows, shape ``(rank, width)``; they need not be orthogonal.
        births: Number of rows wanted, at most ``width - rank``.
        norm: Euclidean norm of each.
        generator: A CPU generator; equal seeds give equal rows on every device.

    Returns:
        Rows of shape ``(births, width)``, of the type and on the device of ``live``.
    """
    width = live.shape[1]
    draws = torch.randn(births, width, generator=generator, dtype=torch.float64)
    basis = torch.cat([live.detach().to("cpu", torch.float64), draws])  # (rank + births, width)
    orthonormal = torch.linalg.qr(basis.T).Q  # columns after the first `rank` span the complement
    return (norm * orthonormal.T[len(live) :]).to(live.device, live.dtype)


def _commit(changes: Sequence[_SiteChange], optimizer: Optimizer | None) -> None:
    done: list[_SiteChange] = []
    saved_state = {} if optimizer is None else dict(optimizer.state)
    try:
        for change in changes:
            done.append(change)
            change.site.install(*(replacement.new for replacement in change.factors))
            for replacement in change.factors:
                _rekey(optimizer, replacement)
    except BaseException:
        for change in done:
            change.site.install(*(replacement.old for replacement in change.factors))
            for replacement in change.factors:
                _set_in_group(optimizer, replacement, replacement.old)
        if optimizer is not None:
            optimizer.state.clear()
            optimizer.state.update(saved_state)
        raise


def _rekey(optimizer: Optimizer | None, replacement: _Replacement) -> None:
    if optimizer is None:
        return
    _set_in_group(optimizer, replacement, replacement.new)
    optimizer.state.pop(replacement.old, None)
    if replacement.state is not None:
        optimizer.state[replacement.new] = replacement.state


def _set_in_group(
    optimizer: Optimizer | None, replacement: _Replacement, parameter: nn.Parameter
) -> None:
    if optimizer is not None and replacement.group is not None:
        group, position = replacement.group
        optimizer.param_groups[group]["params"][position] = parameter
