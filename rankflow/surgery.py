"""Resize adapters and their optimizer state physically; no other module changes a shape.

One event is validated as a whole before anything changes. Then site by site, those that shrink
first, new tensors take the place of the old, and the old are let go: at no moment is there more
than one site's adapter beside what was there before, or will be afterwards. Newborns are drawn
beforehand, on the host. If anything raises, model and optimizer are put back as they were, from the
survivors, which live on, and from what was removed, which waits on the host (``way_back``).

Parameters are replaced by new ``nn.Parameter`` objects inside the existing ``param_groups`` and
``optimizer.state``: resizing ``.data`` fails while an older graph lives, and a parameter that is
not re-keyed never moves again, with no error.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.adapters.newborns import Newborns
from rankflow.adapters.optimizer_state import component_axis, places_in, resize_state
from rankflow.adapters.rebuild import draw_newborns, rebuild_factors, rebuild_magnitude
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site, magnitudes_on
from rankflow.adapters.way_back import after_cut, whole
from rankflow.errors import SurgeryError
from rankflow.records import IntArray, RankPlan
from rankflow.specs.budget import Renormalise


@dataclass(frozen=True, slots=True)
class _SitePlan:
    """A plan's part for one site."""

    index: int
    site: Site
    rank: int  # beforehand
    keep: IntArray
    births: int
    magnitude: bool  # whether the site trains one afterwards

    @property
    def changes_rank(self) -> bool:
        return len(self.keep) < self.rank or self.births > 0

    @property
    def changes_magnitude(self) -> bool:
        return self.magnitude != (self.site.magnitude is not None)

    @property
    def growth(self) -> int:
        """Parameters that the site gains."""
        site = self.site
        components = len(self.keep) + self.births - self.rank
        magnitudes = int(self.magnitude) - (site.magnitude is not None)
        return components * (site.in_features + site.out_features) + magnitudes * site.out_features

    def rescales(self, renormalise: Renormalise) -> bool:
        """Whether a magnitude that stays gets other values."""
        return renormalise == "keep-scale" and len(self.keep) < self.rank


def resize(
    sites: Sequence[Site],
    plan: RankPlan,
    optimizer: Optimizer | None,
    newborns: Newborns,
    renormalise: Renormalise = "none",
    before: Savepoint | None = None,
) -> None:
    """Carry out a plan on the sites and on the optimizer's state, wholly or not at all.

    Survivors keep their values and their optimizer state. A newborn's row of A is drawn, with the
    norm of PEFT's own initialisation, and its column of B is zero, so the function stays what it
    was (for embeddings the roles are swapped, as in PEFT; with a gate, that is zero instead). A
    magnitude that is turned on starts at the norm, which changes nothing either.

    The old parameters are empty afterwards, so a graph of before can no more be gone back through.

    Args:
        sites: The sites, in the plan's order.
        plan: What to keep and how many to add, for each site.
        optimizer: The optimizer that trains the adapters, or None if there is none.
        newborns: Draws the newborns' rows of A.
        renormalise: What a magnitude does when its site loses components; see ``BudgetSpec``.
        before: A savepoint of sites and optimizer that the caller restores if this raises, or later
            on; without one all is put back here.

    Raises:
        SurgeryError: The plan does not fit the sites, or the optimizer holds state that cannot be
            resized; nothing was changed.
    """
    parts = [p for p in _split_plan(sites, plan) if p.changes_rank or p.changes_magnitude]
    places = {} if optimizer is None else places_in(optimizer)
    for part in parts:
        _check_optimizer(part, optimizer, places, renormalise)
    drawn = {part.index: _draw(part, newborns) for part in parts}
    is_own = before is None
    before = before or Savepoint([part.site for part in parts], optimizer=optimizer)
    try:
        for part in sorted(parts, key=lambda part: part.growth):
            _carry_out(part, drawn.pop(part.index), optimizer, places, renormalise, before)
    except BaseException:
        if is_own:
            before.restore()
        raise


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
        kept = torch.as_tensor(part.keep, device=part.site.A.device)
        for name, data in _rebuild(part, kept, _draw(part, newborns), renormalise).items():
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
    before = Savepoint(sites)
    try:
        for site, named in zip(sites, tensors, strict=True):
            old = site.named_parameters
            site.install(**{name: _like(old[name], new) for name, new in named.items()})
    except BaseException:
        before.restore()
        raise


def _split_plan(sites: Sequence[Site], plan: RankPlan) -> list[_SitePlan]:
    """Check a plan against the sites, and hand out its parts."""
    magnitudes = magnitudes_on(sites) if plan.magnitudes is None else plan.magnitudes
    if not len(sites) == len(plan.keep) == len(plan.births) == len(magnitudes):
        raise SurgeryError(
            f"the plan speaks of {len(plan.keep)} sites and the model has {len(sites)}"
        )
    parts = [
        _SitePlan(index, site, site.rank, keep, int(births), bool(on))
        for index, (site, keep, births, on) in enumerate(
            zip(sites, plan.keep, plan.births, magnitudes, strict=True)
        )
    ]
    for part in parts:
        _check_part(part)
    return parts


def _check_part(part: _SitePlan) -> None:
    site, rank, keep, births = part.site, part.rank, part.keep, part.births
    valid = bool(
        births >= 0 and (keep[:-1] < keep[1:]).all() and ((keep >= 0) & (keep < rank)).all()
    )
    if not valid:
        raise SurgeryError(
            f"the plan for site {site.name!r} of rank {rank} is not valid: "
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


def _check_optimizer(
    part: _SitePlan,
    optimizer: Optimizer | None,
    places: Mapping[nn.Parameter, tuple[int, int]],
    renormalise: Renormalise,
) -> None:
    """Check that the optimizer trains what is replaced, and has no state that cannot follow."""
    if optimizer is None:
        return
    site = part.site
    replaced = [factor for factor, _ in site.factors]
    if site.magnitude_slot is not None and (part.changes_magnitude or part.rescales(renormalise)):
        replaced.append(site.magnitude_slot)
    if any(parameter.requires_grad and parameter not in places for parameter in replaced):
        raise SurgeryError(
            f"the optimizer does not train the adapter of site {site.name!r}; build it from "
            "the model's trainable parameters, and pass flow.step() that optimizer"
        )
    for factor, axis in site.factors if len(part.keep) > 0 else ():
        for key, value in optimizer.state.get(factor, {}).items():
            component_axis(site.name, key, value, factor, axis)


def _draw(part: _SitePlan, newborns: Newborns) -> dict[str, Tensor]:
    draw = partial(newborns.rows, part.index)
    return draw_newborns(part.site, part.keep, part.births, draw, newborns.generator)


def _rebuild(
    part: _SitePlan, kept: Tensor, drawn: Mapping[str, Tensor], renormalise: Renormalise
) -> dict[str, Tensor]:
    """Return what the site's parameters become, by name; one that is missing stays."""
    factors = rebuild_factors(part.site, kept, part.births, drawn)
    magnitude = rebuild_magnitude(
        part.site, factors, turn_on=part.magnitude, keep_scale=part.rescales(renormalise)
    )
    return factors if magnitude is None else factors | {"magnitude": magnitude}


def _carry_out(
    part: _SitePlan,
    drawn: Mapping[str, Tensor],
    optimizer: Optimizer | None,
    places: Mapping[nn.Parameter, tuple[int, int]],
    renormalise: Renormalise,
    before: Savepoint,
) -> None:
    """Resize one site, and let its old tensors go."""
    site = part.site
    cut = _Cut.of(part)
    old, axes = site.named_parameters, dict(site.factors)
    keeps_moments = not part.changes_magnitude  # one that goes, or comes anew, has none
    new = {
        name: _like(old[name], data)
        for name, data in _rebuild(part, cut.kept, drawn, renormalise).items()
    }
    for parameter in new.values():
        before.made(parameter)
    site.install(**new)
    for name, successor in new.items():
        was = old[name]
        state = {} if optimizer is None else optimizer.state.get(was, {})
        if was in axes:
            state = cut.follow(site.name, state, was, axes[was], before)
            before.let_go(was, after_cut(was, successor, axes[was], cut.kept, cut.removed))
        else:
            state = state if keeps_moments else _drop(state, before)
            before.let_go(was, whole(was))
        if optimizer is not None:
            _rekey(optimizer, places.get(was), was, successor, state)


def _like(old: nn.Parameter, data: Tensor) -> nn.Parameter:
    return nn.Parameter(data, requires_grad=old.requires_grad)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Which components of a site stay, as indices on its device, and how many come."""

    kept: Tensor
    removed: Tensor
    births: int

    @classmethod
    def of(cls, part: _SitePlan) -> "_Cut":
        home = part.site.A.device
        goes = np.ones(part.rank, dtype=np.bool_)
        goes[part.keep] = False
        kept = torch.as_tensor(part.keep, device=home)
        return cls(kept, torch.as_tensor(goes.nonzero()[0], device=home), part.births)

    def follow(
        self,
        site: str,
        state: Mapping[str, Any],
        parameter: nn.Parameter,
        rank_axis: int,
        before: Savepoint,
    ) -> dict[str, Any]:
        """Resize a factor's optimizer state entry by entry; without survivors it starts afresh."""
        if len(self.kept) == 0:
            return _drop(state, before)
        followed = dict(state)
        for key, value in state.items():
            axis = component_axis(site, key, value, parameter, rank_axis)
            if axis is not None:
                followed[key] = resize_state(key, value, axis, self.kept, self.births)
                before.made(followed[key])
                way_back = after_cut(value, followed[key], axis, self.kept, self.removed)
                before.let_go(value, way_back)
        return followed


def _drop(state: Mapping[str, Any], before: Savepoint) -> dict[str, Any]:
    for value in state.values():
        if isinstance(value, Tensor) and value.ndim > 0:
            before.let_go(value, whole(value))
    return {}


def _rekey(
    optimizer: Optimizer,
    place: tuple[int, int] | None,
    old: nn.Parameter,
    new: nn.Parameter,
    state: dict[str, Any],
) -> None:
    if place is not None:
        group, position = place
        optimizer.param_groups[group]["params"][position] = new
    optimizer.state.pop(old, None)
    if state:
        optimizer.state[new] = state
