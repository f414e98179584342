r"""Give newborn components the Adam steps that they would have had at step 0.

Adam divides its moments by :math:`1 - \beta^t`, with one step count t for a whole tensor. A newborn
that joins late has lived k steps, not t, so its zero moments are corrected as if they were old: its
first update is 3.2 times the learning rate, and its 12th 6.5 times. Here every newborn is counted
on its own. Before each optimizer step its slice of the state and of the gradient is rescaled by

.. math::
    \alpha_k = \frac{1 - \beta_1^t}{1 - \beta_1^k}, \qquad
    \gamma_k = \frac{1 - \beta_2^t}{1 - \beta_2^k}

so that the stored moments are :math:`\alpha_k m_k` and :math:`\gamma_k v_k`, which the shared
correction turns into exactly :math:`m_k / (1 - \beta_1^k)` and :math:`v_k / (1 - \beta_2^k)`. The
gradient's own share of the second moment is made up for beforehand:
:math:`\beta_2 \tilde V + (1 - \beta_2)(\alpha_k g)^2 = \gamma_k v_k`.

After ``YOUTH`` steps the slice is left alone: its second moment is then an unbiased estimate that
Adam's own recursion carries on. (IncreLoRA, arXiv 2308.12043, gives newborns a step count of their
own by splitting the tensor.)

A fused optimizer under a gradient scaler is called even for a step that it skips, and the device
alone knows which: such steps are counted there, and between events nobody waits for that number.

On a GPU all slices of all factors are rescaled in one launch, unless a scaler leaves steps to the
optimizer, or tensors are sharded, on several devices, or of several types (``adapters.young``).
Otherwise torch does it, with five small operations a slice (``adapters.adam``). What is young, and
where, is found after an event, and again when some have grown up.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from rankflow.adapters.adam import MOMENTS, AdamStep, Scaled, read_scaler, rescale_young
from rankflow.adapters.capture import is_capturing
from rankflow.adapters.kernels.choose import fits
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local
from rankflow.adapters.young import YoungSlices
from rankflow.errors import RankFlowError
from rankflow.records import RankPlan

YOUTH = 30


class FairStart:
    """Counts the optimizer steps of young components and corrects Adam for them.

    Other optimizers start a newborn with zero momentum, as at step 0, and need nothing.

    Args:
        sites: The sites, whose components are all mature.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)
        self._hook: RemovableHandle | None = None
        fits(self._sites[0].A)  # asks the device now, when nobody minds to wait for its answer
        self.restart()

    def restart(self) -> None:
        """Take all components that the sites have now for mature."""
        self.resume([[YOUTH] * site.rank for site in self._sites])

    def resume(self, lived: Sequence[Sequence[int]]) -> None:
        """Go on from what ``lived`` returned."""
        self._called = [list(steps) for steps in lived]  # up to YOUTH, with the steps skipped since
        self._skipped: list[Tensor | None] = [None] * len(self._sites)
        self._young: _Young | None = None  # found at the next step

    def lived(self) -> list[list[int]]:
        """Return the steps that each component has lived, up to ``YOUTH``, site by site.

        Where a gradient scaler may have skipped some, it waits for the device.
        """
        skipped = [0 if steps is None else int(steps) for steps in self._skipped]
        return [
            [steps if steps >= YOUTH else steps - fewer for steps in called]
            for called, fewer in zip(self._called, skipped, strict=True)
        ]

    def attach(self, optimizer: Optimizer) -> None:
        """Correct this optimizer from now on, and no other, if it is of Adam's kind."""
        self.close()
        self._young = None
        if isinstance(optimizer, Adam | AdamW):
            self._hook = optimizer.register_step_pre_hook(self._before_step)

    def close(self) -> None:
        """Leave the optimizer alone."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def follow(self, plan: RankPlan) -> None:
        """Follow the components through a resize; newborns beside survivors become young."""
        lived = self.lived()
        for i, (keep, births) in enumerate(zip(plan.keep, plan.births, strict=True)):
            # Without survivors the optimizer's state starts afresh, with a step count of its own.
            newborn = 0 if len(keep) else YOUTH
            lived[i] = [lived[i][j] for j in keep] + [newborn] * int(births)
        self.resume(lived)

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._young is None:
            self._young = _find_young(self._sites, self._called, optimizer)
        young = self._young
        if not young.factors:
            return
        _refuse_capture(young.factors[0].parameter)
        steps = [_read_step(factor, optimizer) for factor in young.factors]
        scaled = read_scaler(optimizer)
        if not (scaled.is_plain and self._correct_at_once(young, steps)):
            self._correct_each(young, steps, scaled)
        for i in {f.site for f in young.factors if f.parameter.grad is not None}:
            self._grow_older(i, young.runs[i])
            if scaled.skips is not None:
                skips = scaled.skips.to(self._sites[i].A.device, non_blocking=True)
                before = self._skipped[i]
                self._skipped[i] = skips if before is None else skips + before

    def _correct_at_once(self, young: "_Young", steps: Sequence[AdamStep | None]) -> bool:
        """Correct all in one launch; return False, with nothing done, where that cannot be."""
        if any(skipped is not None for skipped in self._skipped):
            return False
        lived = [self._called[f.site][part.first] for f in young.factors for part in f.parts]
        return young.slices.correct(steps, lived)

    def _correct_each(
        self, young: "_Young", steps: Sequence[AdamStep | None], scaled: Scaled
    ) -> None:
        """Correct slice by slice, with torch."""
        for factor, step in zip(young.factors, steps, strict=True):
            if step is None:
                continue
            gradient = local(step.gradient)
            moments = {key: local(step.state[key]) for key in MOMENTS if key in step.state}
            here = scaled.on(gradient.device)
            skipped = self._skipped[factor.site]
            for part in factor.parts:
                called = self._called[factor.site][part.first]
                along = factor.axis, part.start, part.length
                rescale_young(
                    gradient.narrow(*along),
                    {key: moment.narrow(*along) for key, moment in moments.items()},
                    shared=step.taken + 1,
                    lived=(called if skipped is None else called - skipped) + 1,
                    betas=step.betas,
                    scaled=here,
                )

    def _grow_older(self, i: int, runs: Sequence[tuple[int, int]]) -> None:
        """Count a step for the young components of a site."""
        called = self._called[i]
        for first, count in runs:
            steps = called[first] + 1
            called[first : first + count] = [steps] * count
            if steps >= YOUTH:
                self._young = None


@dataclass(frozen=True, slots=True)
class _Part:
    """Where equally young components are in a factor.

    Attributes:
        first: A component among them.
        start: Their first index along the factor's axis.
        length: Number of indices.
    """

    first: int
    start: int
    length: int


@dataclass(frozen=True, slots=True)
class _Factor:
    """A factor with young components.

    Attributes:
        site: Index of its site.
        parameter: The factor.
        axis: Its axis that runs over components.
        group: Index of its parameter group.
        parts: Where its young components are.
    """

    site: int
    parameter: nn.Parameter
    axis: int
    group: int
    parts: tuple[_Part, ...]


@dataclass(frozen=True, slots=True)
class _Young:
    """Who is young: the same until an event, or until some have grown up.

    Attributes:
        factors: Factors with young components that the optimizer trains.
        runs: First index and length of each run of equally young components, by site.
        slices: The parts of the factors, in order.
    """

    factors: tuple[_Factor, ...]
    runs: dict[int, list[tuple[int, int]]]
    slices: YoungSlices


def _find_young(
    sites: Sequence[Site], called: Sequence[Sequence[int]], optimizer: Optimizer
) -> _Young:
    groups = {p: n for n, group in enumerate(optimizer.param_groups) for p in group["params"]}
    runs = {i: found for i, steps in enumerate(called) if (found := _young_runs(steps))}
    factors = tuple(
        _Factor(i, parameter, axis, groups[parameter], _find_parts(sites[i], axis, runs[i]))
        for i in runs
        for parameter, axis in sites[i].factors
        if parameter in groups
    )
    slices = [
        (owner, factor.axis, part.start, part.length)
        for owner, factor in enumerate(factors)
        for part in factor.parts
    ]
    return _Young(factors, runs, YoungSlices([f.parameter for f in factors], slices))


def _find_parts(site: Site, axis: int, runs: Sequence[tuple[int, int]]) -> tuple[_Part, ...]:
    return tuple(
        _Part(first, start, length)
        for first, count in runs
        for start, length in site.pieces(axis, first, count)
    )


def _read_step(factor: _Factor, optimizer: Optimizer) -> AdamStep | None:
    """Read what Adam is about to use; None without a gradient, or before its first step."""
    gradient, state = factor.parameter.grad, optimizer.state.get(factor.parameter)
    if gradient is None or state is None or "step" not in state:
        return None
    betas = optimizer.param_groups[factor.group]["betas"]
    return AdamStep(gradient, state, _count(state["step"]), betas)


def _refuse_capture(parameter: Tensor) -> None:
    if is_capturing(parameter):
        raise RankFlowError(
            "optimizer.step() is being captured into a CUDA graph while components are young, and "
            f"each of their first {YOUTH} steps is corrected in its own way, which a replay does "
            "not do: capture forward and backward alone, and call optimizer.step() outside"
        )


def _young_runs(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Return (first index, length) of each run of equally young components.

    >>> _young_runs([30, 2, 2, 0])
    [(1, 2), (3, 1)]
    """
    runs = []
    first = 0
    for lived, members in groupby(steps):
        count = len(list(members))
        if lived < YOUTH:
            runs.append((first, count))
        first += count
    return runs


def _count(step: Tensor) -> float | Tensor:
    """Return Adam's step count: a number where it lives on the CPU, else left on its device."""
    return step.item() if step.device.type == "cpu" else step
