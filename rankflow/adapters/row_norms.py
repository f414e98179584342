r"""The norm of each output row of ``W + s B A``, without the dense product."""

from contextlib import AbstractContextManager, nullcontext

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from rankflow.adapters.base_weight import dense_weight, output_axis
from rankflow.adapters.kernels.choose import fits

# Small enough for a core's cache; a GPU wants few launches instead.
_TILE_BYTES = {"cpu": 2**19}
_TILE_BYTES_ELSEWHERE = 2**25

# Rows whose square is below this share of its terms are summed without expanding it: 1e-2 costs
# at most two of float32's seven digits, and bfloat16 has none to lose.
_CANCELLED = 1e-2
_CANCELLED_LOW = 0.5


def row_norms_of_sum(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    *,
    axis: int = 0,
    squares: Tensor | None = None,
) -> Tensor:
    r"""Norm of each output row of :math:`W + s B A`, without forming the sum.

    On a CPU and in the kernel for GPUs the square is expanded,

    .. math:: n_j^2 = \lVert W_j \rVert^2 + 2 s \sum_k B_{jk} (W A^\top)_{jk}
        + s^2 (B A A^\top B^\top)_{jj},

    and rows in which these terms nearly cancel are taken again from their sum. Elsewhere asking
    whether there are such rows would wait for the device, so all rows are summed, tile by tile.
    The kernel, which asks on the device, reads W once.

    Args:
        weight: W, ``(out, in)`` for ``axis`` 0 and ``(in, out)`` for 1.
        A: Right factor, ``(rank, in)``.
        B: Left factor, ``(out, rank)``.
        scale: s.
        axis: Axis of the weight that runs over output features.
        squares: :math:`\lVert W_j \rVert^2`, shape ``(out,)``, if known.

    Returns:
        Norms, shape ``(out,)``, at least float32, and never 0.
    """
    if fits(weight, A, B):
        from rankflow.adapters.kernels.norm import row_norms  # Triton is optional

        return row_norms(weight, A, B, scale, axis, _CANCELLED)
    A, B = _widened(A, weight), _widened(B, weight)
    if _is_expanded(weight, axis) and not torch.compiler.is_compiling():
        total = _expanded_squares(weight, A, B, scale, squares)
    else:
        total = _sum_of_squares(weight, A, B, scale, axis)
    return total.sqrt().clamp_min(torch.finfo(A.dtype).tiny)


@torch.no_grad()
def measure_norms(
    layer: LoraLayer, A: Tensor, B: Tensor, scale: float, *, squares: Tensor | None = None
) -> Tensor:
    """Return the norm of each output row of a layer's ``W + s B A``, shape ``(out,)``.

    Args:
        layer: The adapted layer.
        A: Its right factor, as PEFT stores it.
        B: Its left factor, as PEFT stores it.
        scale: s.
        squares: The squared norm of each row of W, if known.
    """
    weight = dense_weight(layer).detach().flatten(1)
    with own_precision(weight):
        return row_norms_of_sum(
            weight,
            A.detach().flatten(1),
            B.detach().flatten(1),
            scale,
            axis=output_axis(layer),
            squares=squares,
        )


@torch.no_grad()
def squares_of_base(layer: LoraLayer, A: Tensor, B: Tensor) -> Tensor | None:
    """Return the squared norm of each row of W alone, shape ``(out,)``, as precise as the norms.

    None where these are summed without it.
    """
    if not _is_expanded(layer.get_base_layer().weight, output_axis(layer)):
        return None
    weight = dense_weight(layer).detach().flatten(1)
    A, B = (_widened(t.detach().flatten(1), weight) for t in (A, B))
    with own_precision(weight):
        return _squares_alone(weight, A, B)


def _is_expanded(weight: Tensor, axis: int) -> bool:
    """Whether the torch code takes norms from their terms."""
    return axis == 0 and weight.device.type == "cpu"


def own_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast, where it is on, from choosing the precision of what follows."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _expanded_squares(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, squares: Tensor | None
) -> Tensor:
    if squares is None:
        squares = _squares_alone(weight, A, B)
    # Few rows against many columns is the faster order of a product with few components.
    mixed = (A.to(weight.dtype) @ weight.T).T.to(B.dtype)  # (out, rank)
    cross = 2 * scale * (B * mixed).sum(dim=1)
    own = scale**2 * (B * (B @ (A @ A.T))).sum(dim=1)
    total = squares + cross + own
    # Their sum has lost a share of its digits; in low precision W A^T had few to begin with.
    worst = _CANCELLED if weight.dtype.itemsize >= 4 else _CANCELLED_LOW
    doubtful = total < worst * (squares + own)
    if doubtful.any():
        for rows in doubtful.nonzero().flatten().split(_lines(B, weight)):
            total[rows] = _sum_of_squares(weight[rows], A, B[rows], scale, axis=0)
    return total


def _squares_alone(weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return _sum_of_squares(weight, A[:0], B[:, :0], 0.0, axis=0)


def _sum_of_squares(weight: Tensor, A: Tensor, B: Tensor, scale: float, axis: int) -> Tensor:
    left, right = (B, A) if axis == 0 else (A.T, B.T)
    lines = _lines(B, weight)
    tiles = zip(weight.split(lines), left.split(lines), strict=True)
    parts = [
        torch.addmm(tile.to(B.dtype), factor, right, alpha=scale).square_().sum(dim=1 - axis)
        for tile, factor in tiles
    ]
    return torch.cat(parts) if axis == 0 else torch.stack(parts).sum(dim=0)


def _lines(B: Tensor, weight: Tensor) -> int:
    """Lines of the weight that fill a tile."""
    limit = _TILE_BYTES.get(weight.device.type, _TILE_BYTES_ELSEWHERE)
    return max(1, limit // (weight.shape[1] * B.dtype.itemsize))


def _widened(factor: Tensor, weight: Tensor) -> Tensor:
    """Convert a factor to the precision of the norms: its own or W's, at least float32."""
    dtype = torch.promote_types(weight.dtype, factor.dtype)
    return factor.to(torch.promote_types(dtype, torch.float32))
