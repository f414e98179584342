"""Resize adapters and their optimizer state physically; no other module changes a shape.

One event is validated as a whole, built as a whole beside the living model, and then committed by
assignments alone; if anything raises, model and optimizer are put back as they were.

Parameters are replaced by new ``nn.Parameter`` objects inside the existing ``param_groups`` and
``optimizer.state``: resizing ``.data`` fails while an older graph lives, and a parameter that is
not re-keyed never moves again, with no error.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.adapters.newborns import Newborns
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
    A: _Replacement
    B: _Replacement


def resize(
    sites: Sequence[Site], plan: RankPlan, optimizer: Optimizer | None, newborns: Newborns
) -> None:
    """Carry out a plan on the sites and on the optimizer's state, wholly or not at all.

    Survivors keep their values and their optimizer state. A newborn's row of A is drawn, with the
    norm of PEFT's own initialisation, and its column of B is zero, so the function stays what it
    was (for embeddings the roles are swapped, as in PEFT).

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        optimizer: The optimizer that trains the adapters, or None if there is none.
        newborns: Draws the newborns' rows of A.

    Raises:
        SurgeryError: The plan does not fit the sites, or the optimizer holds state that cannot be
            resized; nothing was changed.
    """
    _check_plan(sites, plan)
    places = {} if optimizer is None else _places(optimizer)
    changes = [
        _build(site, keep, int(births), optimizer, places, partial(newborns, index))
        for index, (site, keep, births) in enumerate(
            zip(sites, plan.keep, plan.births, strict=True)
        )
        if len(keep) < site.rank or births > 0
    ]
    _commit(changes, optimizer)


def resize_in_place(sites: Sequence[Site], plan: RankPlan, newborns: Newborns) -> None:
    """Carry out a plan before training, keeping the identity of every parameter.

    An optimizer made earlier goes on holding the same objects. It must not have taken a step yet.

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        newborns: Draws the newborns' rows of A.

    Raises:
        SurgeryError: The plan does not fit the sites.
    """
    _check_plan(sites, plan)
    for index, (site, keep, births) in enumerate(zip(sites, plan.keep, plan.births, strict=True)):
        if len(keep) == site.rank and births == 0:
            continue
        A, B = site.A, site.B
        new_A, new_B = _new_factors(site, keep, int(births), partial(newborns, index))
        for parameter, data in ((A, new_A), (B, new_B)):
            parameter.grad = None
            parameter.data = data
        site.install(A, B)


def check_state(site: Site, optimizer: Optimizer) -> None:
    """Check that the optimizer's state has the shapes of the site's factors.

    A fused optimizer does not check them, and would write beyond the state's memory.

    Args:
        site: The site.
        optimizer: The optimizer that trains it.

    Raises:
        SurgeryError: The optimizer has taken steps while the site had another rank.
    """
    for parameter in (site.A, site.B):
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
    draw: Callable[[Tensor, int], Tensor],
) -> _SiteChange:
    new_A, new_B = _new_factors(site, keep, births, draw)
    return _SiteChange(
        site,
        _replace(site, site.A, new_A, 0, keep, births, optimizer, places),
        _replace(site, site.B, new_B, 1, keep, births, optimizer, places),
    )


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
    site: Site, keep: IntArray, births: int, draw: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return A and B with the kept components followed by the newborns."""
    kept = torch.as_tensor(keep, device=site.A.device)
    A = site.A.detach().index_select(0, kept)
    B = site.B.detach().index_select(1, kept)
    if births == 0:
        return A, B
    if site.kind == "embedding":  # PEFT starts embeddings at A = 0 and B of standard deviation 1
        columns = (math.sqrt(B.shape[0]) * draw(B.flatten(1).T, births)).to(B)
        return _grow(A, 0, births), torch.cat([B, columns.T], dim=1)
    # PEFT draws A from U(-1/sqrt(in), 1/sqrt(in)): rows of norm 1/sqrt(3).
    rows = (draw(A.flatten(1), births) / math.sqrt(3)).to(A)
    return torch.cat([A, rows.view(births, *A.shape[1:])]), _grow(B, 1, births)


def _commit(changes: Sequence[_SiteChange], optimizer: Optimizer | None) -> None:
    done: list[_SiteChange] = []
    saved_state = {} if optimizer is None else dict(optimizer.state)
    try:
        for change in changes:
            done.append(change)
            change.site.install(change.A.new, change.B.new)
            for replacement in (change.A, change.B):
                _rekey(optimizer, replacement)
    except BaseException:
        for change in done:
            change.site.install(change.A.old, change.B.old)
            for replacement in (change.A, change.B):
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
