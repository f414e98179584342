"""What methods do to a base model before they add something of their own."""

from collections.abc import Callable

import torch
from torch import nn

from rankflow.training.models import BaseModel


def freeze(base: BaseModel) -> None:
    """Freeze everything but the modules that train in full with every method."""
    base.model.requires_grad_(False)
    for name in base.full_modules:
        base.model.get_submodule(name).requires_grad_(True)


def hold_in_float32(model: nn.Module) -> Callable[[], None] | None:
    """Widen the parameters for training, as PEFT does with an adapter's.

    In bfloat16 a step of less than a 256th of a weight is lost. Buffers stay as they are: rotary
    frequencies are float32 in every model, and would not survive the way back.

    Args:
        model: Changed in place.

    Returns:
        Brings every parameter back to the type that it had; None if all were float32.
    """
    narrow = {p: p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)}
    for parameter in narrow:
        parameter.data = parameter.data.float()

    def narrow_again() -> None:
        for parameter, dtype in narrow.items():
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)

    return narrow_again if narrow else None


def lies_in(name: str, modules: tuple[str, ...]) -> bool:
    """Whether a module is one of those named, or inside one.

    >>> lies_in("bert.pooler.dense", ("bert.pooler", "classifier"))
    True
    """
    return any(f"{name}.".startswith(f"{module}.") for module in modules)
