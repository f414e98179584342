r"""DoRA's output from the base layer's, as one step of autograd.

Products with a factor are written with the components first, ``(rank, tokens)`` and
``(rank, out)``: with 8 components in float32 this order is three to eight times faster on a CPU
than the one of ``nn.Linear``, and nowhere slower.

The base layer's output is kept for the magnitude's gradient. The output itself would do, divided by
m, and often costs nothing because the next operation keeps it too. But an activation that works in
place, such as ``ReLU(inplace=True)``, may overwrite it, and m may be 0.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankflow.adapters.base_weight import is_zero_row, magnitude_factor
from rankflow.adapters.kernels.choose import fits


class Compose(torch.autograd.Function):
    r"""``y = c * (base - b) + b + (x A^T)(s c B)^T`` and its gradients, the norm held constant."""

    @staticmethod
    def forward(
        ctx: Any,
        base: Tensor,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None,
        norms: Tensor,
        scale: float,
    ) -> Tensor:
        """Return y, shape ``(..., out)``.

        Args:
            ctx: Carries what backward needs.
            base: Output of the base layer, bias included, shape ``(..., out)``.
            x: Input of the low-rank branch, shape ``(..., in)``.
            A: Shape ``(rank, in)``.
            B: Shape ``(out, rank)``.
            magnitude: Shape ``(out,)``.
            bias: The base layer's bias, shape ``(out,)``, or None.
            norms: Shape ``(out,)``.
            scale: Factor of the low-rank branch.
        """
        dtype = base.dtype
        inputs = x.reshape(-1, x.shape[-1]).to(dtype)  # (tokens, in)
        factor = magnitude_factor(magnitude, norms)
        hidden = A.to(dtype) @ inputs.T  # (rank, tokens)
        compute = _mix
        if fits(base, hidden, B, factor, *_given(bias)):
            from rankflow.adapters.kernels.compose import mix as compute  # Triton is optional
        y = compute(base, hidden, B, factor, bias, scale)
        ctx.save_for_backward(base, inputs, hidden, A, B, magnitude, bias, norms, factor)
        ctx.scale = scale
        ctx.x_like = (x.shape, x.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs that want one."""
        base, inputs, hidden, A, B, magnitude, bias, norms, factor = ctx.saved_tensors
        x_shape, x_dtype = ctx.x_like
        wants = ctx.needs_input_grad
        g = gradient.reshape(-1, gradient.shape[-1])  # (tokens, out)
        compute = _mix_gradients
        if fits(g, base, hidden, B, factor, norms, *_given(bias)):
            from rankflow.adapters.kernels.compose import mix_gradients as compute
        d_base, d_B, d_magnitude, d_bias = compute(
            g, base.reshape(g.shape), hidden, B, factor, norms, bias, ctx.scale, wants[0], wants[5]
        )
        d_x = d_A = None
        if wants[1] or wants[2]:
            scales = (ctx.scale * factor).unsqueeze(1)
            d_hidden = (B * scales).to(g.dtype).T @ g.T  # (rank, tokens)
            if wants[1]:
                d_x = (d_hidden.T @ A.to(g.dtype)).to(x_dtype).view(x_shape)
            if wants[2]:
                d_A = (d_hidden @ inputs).to(A.dtype)
        return (
            d_base.view(base.shape) if wants[0] else None,
            d_x,
            d_A,
            d_B,
            d_magnitude.to(magnitude.dtype).view(magnitude.shape),
            d_bias.to(bias.dtype) if wants[5] else None,
            None,
            None,
        )


def _given(bias: Tensor | None) -> tuple[Tensor, ...]:
    return () if bias is None else (bias,)


def _mix(
    base: Tensor, hidden: Tensor, B: Tensor, factor: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Return DoRA's output, shape ``(..., out)``, from the base layer's and ``A x``."""
    dtype = base.dtype
    # In low precision c - 1 is exact to more digits than c, which is near 1.
    excess = (factor - 1).to(dtype)
    scaled = (B * (scale * factor).unsqueeze(1)).to(dtype)
    if bias is None:
        y = torch.addcmul(base, base, excess)
    else:
        y = torch.lerp(base, bias.to(dtype), -excess)
    y = y.contiguous()
    y.view(-1, len(B)).addmm_(hidden.T, scaled.T)
    return y


def _mix_gradients(
    g: Tensor,
    base: Tensor,
    hidden: Tensor,
    B: Tensor,
    factor: Tensor,
    norms: Tensor,
    bias: Tensor | None,
    scale: float,
    wants_base: bool,
    wants_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of the base layer's output, of B, of m and of the bias.

    The first and the last are empty where they are not wanted.
    """
    wide = factor.dtype
    outer = (hidden @ g).T.contiguous().to(wide)  # (out, rank)
    along = _dot_over_tokens(g, base, bias, wide)
    along = along + scale * (outer * B.to(wide)).sum(dim=1)
    return (
        torch.addcmul(g, g, (factor - 1).to(g.dtype)) if wants_base else g.new_empty(0),
        (outer * (scale * factor).unsqueeze(1)).to(B.dtype),
        torch.where(is_zero_row(norms), 0, along / norms),
        (1 - factor) * g.sum(dim=0, dtype=wide) if wants_bias else g.new_empty(0),
    )


def _dot_over_tokens(g: Tensor, base: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """Return the sum over tokens of ``g * (base - bias)``, shape ``(out,)``, in type ``wide``.

    The gradients of a layer norm's weight and bias are such sums, for tokens of mean 0 and
    deviation 1. Its kernel for a CPU reads both tensors once and writes nothing of their size, but
    adds up in their own precision.
    """
    if g.device.type != "cpu" or g.dtype != wide:
        dot = (g * base).sum(dim=0, dtype=wide)
        return dot if bias is None else dot - bias.to(wide) * g.sum(dim=0, dtype=wide)
    tokens, out = g.shape
    mean, deviation, weight = g.new_zeros(tokens), g.new_ones(tokens), g.new_ones(out)
    _, dot, total = torch.ops.aten.native_layer_norm_backward(
        g, base, [out], mean, deviation, weight, weight, [False, True, bias is not None]
    )
    return dot if bias is None else dot - bias.to(wide) * total
