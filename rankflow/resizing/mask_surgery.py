"""Prune and give birth without a new shape: slots are set to zero, and rows are written into them.

One event is validated as a whole and drawn as a whole before anything is written.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rankflow.adapters.newborns import Newborns
from rankflow.adapters.rebuild import at_start_length
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import Slots, local
from rankflow.errors import SurgeryError
from rankflow.records import RankPlan
from rankflow.resizing.slot_scores import slots_of


@dataclass(frozen=True, slots=True)
class _Change:
    """What changes at one site."""

    site: Site
    kept: list[int]  # slots of the survivors
    born: list[int]  # slots of the newborns
    rows: Tensor  # their rows, (births, width)


def resize(
    sites: Sequence[Site],
    plan: RankPlan,
    optimizer: Optimizer | None,
    newborns: Newborns,
    rows: Sequence[Tensor],
) -> None:
    """Carry out a plan in this process's part of the sites and of the optimizer's state.

    As in ``surgery.resize`` survivors keep their values and their state, and a newborn has a drawn
    row of A, a zero column of B and zero moments. A site without survivors starts its optimizer
    state afresh.

    Args:
        sites: The sites, which have slots, in the plan's order.
        plan: What to keep and how many to add, for each site.
        optimizer: The optimizer that trains the adapters, or None if there is none.
        newborns: Draws the newborns' rows of A.
        rows: The live rows of each site, ``(rank, width)``, whole.

    Raises:
        SurgeryError: The plan does not fit the sites, or the optimizer holds state of another
            shape; nothing was changed.
    """
    for site in sites:
        _check_state(site, optimizer)
    changes = [
        _draw(index, site, plan, newborns, rows[index])
        for index, site in enumerate(sites)
        if len(plan.keep[index]) < site.rank or plan.births[index] > 0
    ]
    for change in changes:
        _carry_out(change, optimizer)


def keep_only(slots: Slots, live: Sequence[int], optimizer: Optimizer | None) -> None:
    """Leave components in these slots, in this order, and zeros in all others."""
    slots.clear(sorted(set(range(slots.capacity)) - set(live)), _tensors(slots, optimizer))
    slots.live = list(live)


def held(sites: Sequence[Site], optimizer: Optimizer | None) -> Iterator[Tensor]:
    """Yield this process's part of everything that a resize may write to."""
    for slots in slots_of(sites):
        for tensor, _ in _tensors(slots, optimizer):
            yield local(tensor)


def _draw(index: int, site: Site, plan: RankPlan, newborns: Newborns, rows: Tensor) -> _Change:
    (slots,) = slots_of([site])
    keep, births = plan.keep[index], int(plan.births[index])
    kept = [slots.live[i] for i in keep]
    free = sorted(set(range(slots.capacity)) - set(kept))
    if births > len(free):
        raise SurgeryError(
            f"site {site.name!r} has {len(free)} free slots for {births} newborns; "
            f"LoraConfig(r={slots.capacity}) is its largest rank under FSDP2"
        )
    if births == 0:
        return _Change(site, kept, [], rows[:0])
    drawn = newborns.rows(index, rows[torch.as_tensor(keep, device=rows.device)], births)
    return _Change(site, kept, free[:births], at_start_length(site, drawn))


@torch.no_grad()
def _carry_out(change: _Change, optimizer: Optimizer | None) -> None:
    site, (slots,) = change.site, slots_of([change.site])
    keep_only(slots, change.kept, optimizer)
    if not change.kept and optimizer is not None:
        for parameter in (slots.A, slots.B):
            optimizer.state.pop(parameter, None)
    slots.live = [*change.kept, *change.born]
    if site.kind == "embedding":
        here, part = slots.outputs_here, local(slots.B)
        part[:, change.born] = change.rows.T[here.start : here.stop].to(part)
        return
    part = local(slots.A)
    for slot, row in zip(change.born, change.rows, strict=True):
        if slot in slots.here:
            part[slot - slots.here.start] = row.to(part).view(part.shape[1:])


def _tensors(slots: Slots, optimizer: Optimizer | None) -> list[tuple[Tensor, int]]:
    """Return A, B and their moments, each with its axis that runs over the slots."""
    found: list[tuple[Tensor, int]] = []
    for parameter, axis in ((slots.A, 0), (slots.B, 1)):
        found.append((parameter, axis))
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        moments = [value for value in state.values() if isinstance(value, Tensor)]
        found += [(value, axis) for value in moments if value.shape == parameter.shape]
    return found


def _check_state(site: Site, optimizer: Optimizer | None) -> None:
    for parameter, _ in site.factors:
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        for key, value in state.items():
            if not isinstance(value, Tensor) or (value.ndim == 0 and key == "step"):
                continue
            if value.shape != parameter.shape or _placements(value) != _placements(parameter):
                raise SurgeryError(
                    f"the optimizer's state {key!r} for site {site.name!r} has shape "
                    f"{tuple(value.shape)} and is not sharded like the parameter of shape "
                    f"{tuple(parameter.shape)}, so its part of a component cannot be set to zero; "
                    "under FSDP2 use AdamW or SGD, made after fully_shard"
                )


def _placements(tensor: Tensor) -> Sequence[object] | None:
    return tensor.placements if isinstance(tensor, DTensor) else None
