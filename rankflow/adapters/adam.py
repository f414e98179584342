"""What Adam is about to use at a step, and its correction for young components by torch.

The correction's equations are those of ``rankflow.fairstart``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

SQUARES = ("exp_avg_sq", "max_exp_avg_sq")
MOMENTS = ("exp_avg", *SQUARES)


@dataclass(frozen=True, slots=True)
class AdamStep:
    """What Adam is about to use for one parameter.

    Attributes:
        gradient: Its gradient.
        state: Its state.
        taken: Its steps so far: a number, or on the device where the host does not know it.
        betas: Decay of the first and of the second moment.
    """

    gradient: Tensor
    state: dict[str, Tensor]
    taken: float | Tensor
    betas: tuple[float, float]


@dataclass(frozen=True, slots=True)
class Scaled:
    """What a gradient scaler leaves to a fused optimizer.

    Attributes:
        skips: 1 if the step is skipped for an overflow and 0 if not, shape ``()``; None if no
            scaler leaves it to the optimizer.
        loss_scale: The loss scale that is still on the gradients, None if there is none.
    """

    skips: Tensor | None
    loss_scale: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether a scaler leaves nothing to the optimizer."""
        return self.skips is None and self.loss_scale is None

    def on(self, device: torch.device) -> "Scaled":
        """Return the same on a device, without waiting for it."""
        if self.is_plain:
            return self
        both = (self.skips, self.loss_scale)
        return Scaled(*(None if t is None else t.to(device, non_blocking=True) for t in both))

    def unscale(self, gradient: Tensor) -> Tensor:
        """Return a gradient without the loss scale, and zeros in a step that is skipped."""
        unscaled = gradient if self.loss_scale is None else gradient / self.loss_scale
        return unscaled if self.skips is None else torch.where(self.skips > 0, 0.0, unscaled)

    def unless_skipped(self, factor: Tensor | float) -> Tensor | float:
        """Return a factor, and 1 in a step that is skipped."""
        return factor if self.skips is None else torch.where(self.skips > 0, 1.0, factor)


def read_scaler(optimizer: Optimizer) -> Scaled:
    """Read what ``torch.amp.GradScaler`` sets for the time of a step."""
    return Scaled(getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None))


def rescale_young(
    gradient: Tensor,
    state: dict[str, Tensor],
    *,
    shared: float | Tensor,
    lived: int | Tensor,
    betas: tuple[float, float],
    scaled: Scaled,
) -> None:
    """Rescale young components in place before the step that will be their ``lived``-th.

    Args:
        gradient: Their part of a gradient.
        state: Their part of Adam's moments.
        shared: Which step of the whole parameter it will be.
        lived: Which of theirs.
        betas: Decay of the first and of the second moment.
        scaled: What is left to the optimizer, on the same device.
    """
    beta1, beta2 = betas
    alpha = _ratio(beta1, shared, lived)
    gamma = _ratio(beta2, shared, lived)
    grown = scaled.unless_skipped(gamma / _ratio(beta2, shared - 1, lived - 1))
    for key in SQUARES:
        if key in state:
            state[key].mul_(grown)
    owed = (1 - beta2) / beta2 * (gamma - alpha**2) if beta2 > 0 else 0.0
    seen = scaled.unscale(gradient)
    state["exp_avg_sq"].addcmul_(seen, seen * owed)
    grown = scaled.unless_skipped(alpha / _ratio(beta1, shared - 1, lived - 1))
    state["exp_avg"].mul_(grown)
    gradient.mul_(alpha)


def _ratio(beta: float, shared: float | Tensor, lived: int | Tensor) -> float | Tensor:
    """Return ``(1 - beta^shared) / (1 - beta^lived)``; 1 before the first step."""
    if isinstance(lived, Tensor):
        return torch.where(lived > 0, (1 - beta**shared) / (1 - beta**lived), 1.0)
    return 1.0 if lived == 0 else (1 - beta**shared) / (1 - beta**lived)
