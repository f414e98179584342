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

Draw = Callable[[Tensor, int], Tensor]
"""Draws newborns: (live rows ``(rank, width)``, births) to float64 rows ``(births, width)``."""


def rebuild_factors(
    site: Site, keep: IntArray, births: int, draw: Draw, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return A, B and, if there is one, the gate: the kept components followed by the newborns.

    Args:
        site: The site.
        keep: Ascending indices of the components that stay.
        births: Number of newborns.
        draw: Draws their rows of A (embeddings: columns of B).
        generator: A CPU generator for gated newborns, which are drawn by Kaiming's rule.
    """
    kept = torch.as_tensor(keep, device=site.A.device)
    names = ("A", "B", "gate")[: len(site.factors)]
    stayed = {
        name: factor.detach().index_select(axis, kept)
        for name, (factor, axis) in zip(names, site.factors, strict=True)
    }
    if births == 0:
        return stayed
    A, B = stayed["A"], stayed["B"]
    if site.gate is not None:  # both are drawn as at the start, and the gate closes them off
        if site.row_gate is None:
            rows, columns = draw_components(site, births, B.shape[1] + births, generator)
        else:
            rows, columns = draw_unused(site, A, births, generator)
        gate = grow(stayed["gate"], 0, births)
        return {"A": torch.cat([A, rows]), "B": torch.cat([B, columns], dim=1), "gate": gate}
    if site.kind == "embedding":
        columns = at_start_length(site, draw(B.flatten(1).T, births)).to(B)
        return {"A": grow(A, 0, births), "B": torch.cat([B, columns.T], dim=1)}
    rows = at_start_length(site, draw(A.flatten(1), births)).to(A).view(births, *A.shape[1:])
    return {"A": torch.cat([A, rows]), "B": grow(B, 1, births)}


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


def grow(value: Tensor, axis: int, births: int) -> Tensor:
    """Append zeros along an axis."""
    shape = list(value.shape)
    shape[axis] = births
    return torch.cat([value, value.new_zeros(shape)], dim=axis)
