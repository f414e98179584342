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
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from rankflow.adapters.capture import is_capturing
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local
from rankflow.errors import RankFlowError
from rankflow.records import RankPlan

YOUTH = 30

_SQUARES = ("exp_avg_sq", "max_exp_avg_sq")


class FairStart:
    """Counts the optimizer steps of young components and corrects Adam for them.

    Other optimizers start a newborn with zero momentum, as at step 0, and need nothing.

    Args:
        sites: The sites, whose components are all mature.
    """

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)
        self._hook: RemovableHandle | None = None
        self.restart()

    def restart(self) -> None:
        """Take all components that the sites have now for mature."""
        self.resume([[YOUTH] * site.rank for site in self._sites])

    def resume(self, lived: Sequence[Sequence[int]]) -> None:
        """Go on from what ``lived`` returned."""
        self._called = [list(steps) for steps in lived]  # up to YOUTH, with the steps skipped since
        self._skipped: list[Tensor | None] = [None] * len(self._sites)

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

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not any(_young_runs(steps) for steps in self._called):
            return
        _refuse_capture(self._sites[0].A)
        betas = {
            parameter: group["betas"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for i, (site, called) in enumerate(zip(self._sites, self._called, strict=True)):
            trained = [(p, p.grad, axis) for p, axis in site.factors if p.grad is not None]
            young = _young_runs(called)
            if not trained or not young:  # without a gradient Adam does not count this step either
                continue
            scaled = _read_scaler(optimizer, site.A.device)
            skipped = self._skipped[i]
            for steps, first, count in young:
                lived = steps if skipped is None else steps - skipped
                for parameter, gradient, axis in trained:
                    state = optimizer.state.get(parameter, {})
                    if "step" not in state:
                        continue
                    for start, length in site.pieces(axis, first, count):
                        _correct(
                            local(gradient).narrow(axis, start, length),
                            {
                                key: local(state[key]).narrow(axis, start, length)
                                for key in ("exp_avg", *_SQUARES)
                                if key in state
                            },
                            shared=_count(state["step"]) + 1,
                            lived=lived + 1,
                            betas=betas[parameter],
                            scaled=scaled,
                        )
                called[first : first + count] = [steps + 1] * count
            if scaled.skips is not None:
                self._skipped[i] = scaled.skips + (0 if skipped is None else skipped)


@dataclass(frozen=True, slots=True)
class _Scaled:
    """What a gradient scaler leaves to a fused optimizer, on the device of a site.

    Attributes:
        skips: 1 if the step is skipped for an overflow and 0 if not, shape ``()``; None if no
            scaler leaves it to the optimizer.
        loss_scale: The loss scale that is still on the gradients.
    """

    skips: Tensor | None
    loss_scale: Tensor | float

    def unless_skipped(self, value: Tensor | float, otherwise: float) -> Tensor | float:
        """Return ``value``, or in a step that is skipped ``otherwise``."""
        return value if self.skips is None else torch.where(self.skips > 0, otherwise, value)


def _read_scaler(optimizer: Optimizer, device: torch.device) -> _Scaled:
    """Read what ``torch.amp.GradScaler`` sets for the time of a step, without waiting for it."""
    skips = getattr(optimizer, "found_inf", None)
    scale = getattr(optimizer, "grad_scale", None)
    return _Scaled(
        None if skips is None else skips.to(device, non_blocking=True),
        1.0 if scale is None else scale.to(device, non_blocking=True),
    )


def _refuse_capture(parameter: Tensor) -> None:
    if is_capturing(parameter):
        raise RankFlowError(
            "optimizer.step() is being captured into a CUDA graph while components are young, and "
            f"each of their first {YOUTH} steps is corrected in its own way, which a replay does "
            "not do: capture forward and backward alone, and call optimizer.step() outside"
        )


def _young_runs(steps: Sequence[int]) -> list[tuple[int, int, int]]:
    """Return (steps lived, first index, length) of each run of equally young components.

    >>> _young_runs([30, 2, 2, 0])
    [(2, 1, 2), (0, 3, 1)]
    """
    runs = []
    first = 0
    for lived, members in groupby(steps):
        count = len(list(members))
        if lived < YOUTH:
            runs.append((lived, first, count))
        first += count
    return runs


def _correct(
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    shared: float | Tensor,
    lived: int | Tensor,
    betas: tuple[float, float],
    scaled: _Scaled,
) -> None:
    """Rescale young components before the step that will be their ``lived``-th."""
    beta1, beta2 = betas
    alpha = _ratio(beta1, shared, lived)
    gamma = _ratio(beta2, shared, lived)
    for key in _SQUARES:
        if key in state:
            grown = gamma / _ratio(beta2, shared - 1, lived - 1)
            state[key].mul_(scaled.unless_skipped(grown, 1.0))
    owed = (1 - beta2) / beta2 * (gamma - alpha**2) if beta2 > 0 else 0.0
    owing = (gradient / scaled.loss_scale).square() * owed
    state["exp_avg_sq"].add_(scaled.unless_skipped(owing, 0.0))
    grown = alpha / _ratio(beta1, shared - 1, lived - 1)
    state["exp_avg"].mul_(scaled.unless_skipped(grown, 1.0))
    gradient.mul_(alpha)


def _ratio(beta: float, shared: float | Tensor, lived: int | Tensor) -> float | Tensor:
    """Return ``(1 - beta^shared) / (1 - beta^lived)``; 1 before the first step."""
    if isinstance(lived, Tensor):
        return torch.where(lived > 0, (1 - beta**shared) / (1 - beta**lived), 1.0)
    return 1.0 if lived == 0 else (1 - beta**shared) / (1 - beta**lived)


def _count(step: Tensor) -> float | Tensor:
    """Return Adam's step count: a number where it lives on the CPU, else left on its device."""
    return step.item() if step.device.type == "cpu" else step
