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
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer
from torch.utils.hooks import RemovableHandle

from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local
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
        self.steps = [[YOUTH] * site.rank for site in self._sites]

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
        for i, (keep, births) in enumerate(zip(plan.keep, plan.births, strict=True)):
            # Without survivors the optimizer's state starts afresh, with a step count of its own.
            newborn = 0 if len(keep) else YOUTH
            self.steps[i] = [self.steps[i][j] for j in keep] + [newborn] * int(births)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not any(_young_runs(steps) for steps in self.steps) or _will_skip(optimizer):
            return
        betas = {
            parameter: group["betas"]
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        for site, steps in zip(self._sites, self.steps, strict=True):
            trained = [(p, p.grad, axis) for p, axis in site.factors if p.grad is not None]
            if not trained:  # Adam does not count this step either
                continue
            for lived, first, count in _young_runs(steps):
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
                            loss_scale=_loss_scale(optimizer),
                        )
                steps[first : first + count] = [lived + 1] * count


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
    lived: int,
    betas: tuple[float, float],
    loss_scale: float | Tensor,
) -> None:
    """Rescale young components before the step that will be their ``lived``-th."""
    beta1, beta2 = betas
    alpha = _ratio(beta1, shared, lived)
    gamma = _ratio(beta2, shared, lived)
    for key in _SQUARES:
        if key in state:
            state[key].mul_(gamma / _ratio(beta2, shared - 1, lived - 1))
    owed = (1 - beta2) / beta2 * (gamma - alpha**2) if beta2 > 0 else 0.0
    state["exp_avg_sq"].add_((gradient / loss_scale).square() * owed)
    state["exp_avg"].mul_(alpha / _ratio(beta1, shared - 1, lived - 1))
    gradient.mul_(alpha)


def _will_skip(optimizer: Optimizer) -> bool:
    """Whether a gradient scaler found an overflow, so that a fused optimizer skips this step."""
    found = getattr(optimizer, "found_inf", None)  # torch.amp.GradScaler sets it for the step
    return found is not None and bool(found)


def _loss_scale(optimizer: Optimizer) -> float | Tensor:
    """Return the loss scale that a fused optimizer still has to take off its gradients."""
    scale = getattr(optimizer, "grad_scale", None)  # set and removed like found_inf
    return 1.0 if scale is None else scale


def _ratio(beta: float, shared: float | Tensor, lived: int) -> float | Tensor:
    """Return ``(1 - beta^shared) / (1 - beta^lived)``; 1 before the first step."""
    return 1.0 if lived == 0 else (1 - beta**shared) / (1 - beta**lived)


def _count(step: Tensor) -> float | Tensor:
    """Return Adam's step count: a number where it lives on the CPU, else left on its device."""
    return step if step.is_cuda else step.item()
