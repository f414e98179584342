r"""The weight that a site acts with, :math:`W' = \frac{m}{n} (W + s B A)`, from dense matrices.

Independent of the fast forward and of PEFT's merging, which it is held against.
"""

import torch
from torch import Tensor

from rankflow.adapters.base_weight import base_rows, output_axis
from rankflow.adapters.sites import Site


@torch.no_grad()
def effective_rows(site: Site, dtype: torch.dtype) -> Tensor:
    """Return the adapted weight ``(out_features, in_features)``.

    Args:
        site: The site, of any rank.
        dtype: Type of the arithmetic and of the result.
    """
    W = base_rows(site.layer).to(_device(site), dtype)
    V = W + low_rank_rows(site, dtype)
    if site.magnitude is None:
        return V
    norms = torch.linalg.vector_norm(V, dim=1, keepdim=True)  # (out, 1)
    m = site.magnitude.detach().to(V).view(-1, 1)
    return torch.where(norms > 0, m * V / norms, V)


@torch.no_grad()
def true_change(site: Site) -> Tensor:
    """Return what the adapter adds to the frozen weight, ``(out, in)`` in float64."""
    if site.magnitude is None:
        return low_rank_rows(site, torch.float64)
    W = base_rows(site.layer).to(_device(site), torch.float64)
    return effective_rows(site, torch.float64) - W


@torch.no_grad()
def low_rank_rows(site: Site, dtype: torch.dtype) -> Tensor:
    """Return ``s B A`` alone, shape ``(out, in)``."""
    A, B = (t.detach().flatten(1).to(_device(site), dtype) for t in (site.A, site.effective_B))
    return site.scale * (B @ A)


def in_layout(site: Site, rows: Tensor) -> Tensor:
    """Return rows ``(out, in)`` in the base weight's own layout."""
    axis = output_axis(site.layer)
    shape = site.layer.get_base_layer().weight.movedim(axis, 0).shape
    return rows.view(shape).movedim(0, axis).contiguous()


def _device(site: Site) -> torch.device:
    """Where the arithmetic runs; other accelerators than CUDA lack float64."""
    device = site.A.device
    return device if device.type == "cuda" else torch.device("cpu")
