"""What the tensors of a site become when it is resized: pure, nothing is put in place."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rankflow.adapters.base_weight import is_zero_row, magnitude_factor
from rankflow.adapters.dora import norms_of
from rankflow.adapters.gate import fold
from rankflow.adapters.gating import draw_components
from rankflow.adapters.magnitude import empty_magnitude, neutral_magnitude
from rankflow.adapters.row_norms import measure_norms
from rankflow.adapters.sites import Site
from rankflow.adapters.vera import draw_unused
from rankflow.records import IntArray

_TILE = 2**20  # entries

Draw = Callable[[Tensor, int], Tensor]
"""Draws newborns: (live rows ``(rank, width)``, births) to float64 rows ``(births, width)``."""


def draw_newborns(
    site: Site, keep: IntArray, births: int, draw: Draw, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return what newborns start from, by the factor's name, on the host; elsewhere it is zero.

    Args:
        site: The site, before anything changes.
        keep: Ascending indices of the components that stay.
        births: Number of newborns.
        draw: Draws their rows of A (embeddings: columns of B).
        generator: A CPU generator for gated newborns, which are drawn by Kaiming's rule.
    """
    if births == 0:
        return {}
    kept = torch.as_tensor(keep, device=site.A.device)
    A, B = site.A.detach(), site.B.detach()
    if site.gate is not None:  # both are drawn as at the start, and the gate closes them off
        if site.row_gate is None:
            rows, columns = draw_components(site, births, len(keep) + births, generator)
        else:
            rows, columns = draw_unused(site, A.index_select(0, kept), births, generator)
        return {"A": rows, "B": columns}
    if site.kind == "embedding":
        drawn = draw(B.index_select(1, kept).flatten(1).T, births)
        return {"B": at_start_length(site, drawn).T.to(B.dtype)}
    drawn = draw(A.index_select(0, kept).flatten(1), births)
    return {"A": at_start_length(site, drawn).to(A.dtype).view(births, *A.shape[1:])}


def rebuild_factors(
    site: Site, kept: Tensor, births: int, drawn: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return A, B and, if there is one, the gate: the kept components followed by the newborns.

    Args:
        site: The site.
        kept: Ascending indices of the components that stay, on the site's device.
        births: Number of newborns.
        drawn: What ``draw_newborns`` returned.
    """
    rebuilt = {
        name: take(factor.detach(), axis, kept, births)
        for name, (factor, axis) in zip(("A", "B", "gate"), site.factors, strict=False)
    }
    for name, newborns in drawn.items():
        axis = 0 if name == "A" else 1
        rebuilt[name].narrow(axis, len(kept), births).copy_(newborns)
    return rebuilt


def at_start_length(site: Site, rows: Tensor) -> Tensor:
    """Give drawn rows of mean square length 1, ``(births, width)``, the length that PEFT starts at.

    It draws A from U(-1/sqrt(in), 1/sqrt(in)), rows of norm 1/sqrt(3), and starts embeddings at
    A = 0 and columns of B of standard deviation 1.
    """
    return rows * math.sqrt(rows.shape[1]) if site.kind == "embedding" else rows / math.sqrt(3)


def rebuild_magnitude(
    site: Site, factors: Mapping[str, Tensor], *, turn_on: bool, keep_scale: bool
) -> Tensor | None:
    r"""Return the magnitude beside new factors, empty if it goes; None if it stays as it is.

    Args:
        site: The site, with its old factors.
        factors: What ``rebuild_factors`` returned.
        turn_on: Whether the site trains a magnitude afterwards.
        keep_scale: Whether one that stays is rescaled to keep :math:`m / n` of every row.
    """
    slot, magnitude = site.magnitude_slot, site.magnitude
    if slot is None or (magnitude is None and not turn_on):
        return None
    if not turn_on:
        return empty_magnitude(slot)
    A, B = factors["A"], factors["B"]
    B = fold(B, factors["gate"], site.row_gate) if "gate" in factors else B
    if magnitude is None:
        return neutral_magnitude(site.layer, site.adapter_name, A, B)
    if not keep_scale:
        return None
    scale = magnitude_factor(magnitude.detach(), norms_of(site))
    norms = measure_norms(site.layer, A, B, site.scale)
    rescaled = torch.where(is_zero_row(norms), magnitude.detach().flatten(), scale * norms)
    return rescaled.to(magnitude.dtype).view(magnitude.shape)


def take(value: Tensor, axis: int, kept: Tensor, births: int) -> Tensor:
    """Return some entries along an axis, followed by zeros, and make no other tensor of that size.

    Args:
        value: A tensor.
        axis: The axis.
        kept: Indices of the entries, on the tensor's device.
        births: Number of zeros along the axis.
    """
    if births == 0:
        return value.index_select(axis, kept)
    shape = list(value.shape)
    shape[axis] = len(kept) + births
    taken = value.new_empty(shape)
    taken.narrow(axis, len(kept), births).zero_()
    survivors = taken.narrow(axis, 0, len(kept))
    if axis == 0:
        torch.index_select(value, 0, kept, out=survivors)
        return taken
    # Columns that are written into place at once take a CPU three times as long as through tiles.
    lines = max(1, _TILE * len(value) // max(1, value.numel()))
    for part, source in zip(survivors.split(lines), value.split(lines), strict=True):
        part.copy_(source.index_select(axis, kept))
    return taken


def grow(value: Tensor, axis: int, births: int) -> Tensor:
    """Append zeros along an axis."""
    shape = list(value.shape)
    shape[axis] = births
    return torch.cat([value, value.new_zeros(shape)], dim=axis)
