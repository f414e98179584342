"""What a factor's optimizer state becomes when components go and come: pure, like ``rebuild``."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankflow.adapters.rebuild import take
from rankflow.errors import SurgeryError

FACTORED = {"row_var": -1, "col_var": -2, "exp_avg_sq_row": -1, "exp_avg_sq_col": -2}
"""Factored second moments (Adafactor) and the axis of the parameter that each lacks, counted from
the end; torch keeps the lacking axis with size 1, transformers drops it."""


def places_in(optimizer: Optimizer) -> dict[nn.Parameter, tuple[int, int]]:
    """Return the group of each parameter of an optimizer, and its place in it."""
    return {
        parameter: (g, i)
        for g, group in enumerate(optimizer.param_groups)
        for i, parameter in enumerate(group["params"])
    }


def component_axis(
    site: str, key: str, value: Any, parameter: nn.Parameter, rank_axis: int
) -> int | None:
    """Return the axis of a state that runs over components, or None if the state stays as it is.

    Args:
        site: The site's name.
        key: The state's name.
        value: The state.
        parameter: The factor that it belongs to.
        rank_axis: The factor's axis that runs over components.

    Raises:
        SurgeryError: The state cannot be resized.
    """
    if not isinstance(value, Tensor) or value.ndim == 0:
        return None
    if key in FACTORED:
        lacking = FACTORED[key] % parameter.ndim
        if lacking == rank_axis:
            return None
        dropped = value.ndim < parameter.ndim
        return rank_axis - (1 if dropped and lacking < rank_axis else 0)
    if value.shape == parameter.shape and value.is_floating_point():
        return rank_axis
    if value.numel() == 1:
        return None
    raise SurgeryError(
        f"the optimizer's state {key!r} for site {site!r} has shape {tuple(value.shape)} and "
        f"type {value.dtype}, but the parameter has shape {tuple(parameter.shape)}: it cannot be "
        "resized. Use AdamW, SGD, Adafactor, or another optimizer whose state is not quantised and "
        "has the parameter's shape"
    )


def resize_state(key: str, value: Tensor, axis: int, kept: Tensor, births: int) -> Tensor:
    """Return what a state becomes: the survivors' entries, and behind them those of the newborns.

    Args:
        key: The state's name.
        value: The state.
        axis: What ``component_axis`` returned.
        kept: Indices of the survivors, at least one, on the state's device.
        births: Number of newborns.
    """
    if key not in FACTORED:
        return take(value, axis, kept, births)
    survivors = value.index_select(axis, kept)
    # A newborn with no second moment would take a step sqrt(1 / (1 - beta2)) times too long.
    mean = survivors.mean(dim=axis, keepdim=True)
    return torch.cat([survivors, *[mean] * births], dim=axis)
