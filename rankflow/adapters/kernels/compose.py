r"""DoRA's output from the base layer's, and its gradients, each from one reading.

.. math:: y = x_0 + (c - 1)(x_0 - b) + s\, c\, (B\, h), \qquad h = A x, \quad c_j = m_j / n_j

where x_0 is the base layer's output, bias b included. With g the gradient of y, the gradients are
``c g`` for x_0 and sums over tokens: ``s c (h g)`` for B, ``(1 - c) sum g`` for b, and for m the
sum of ``g (x_0 - b + s B h)`` over n, whose last term is the row sum of ``s (h g) B``.

*Bytes.* Both directions are bound by memory. At few components they move, in bytes per entry of a
bfloat16 output (PEFT with its float32 adapters):

========  =======  =====  ====
          kernels  torch  PEFT
========  =======  =====  ====
forward         4      8    54
backward        8     16    86
========  =======  =====  ====

The partial sums of backward add half a byte at 32 components.

*Split.* Forward reads x_0 and writes y, which is rounded once; all that belongs to a component
stays in the cache. Backward reads g and x_0 and writes ``c g``; each program takes some output
features and a run of tokens, and leaves partial sums over its tokens, ``rank + 2`` numbers for each
feature. A second kernel adds them in a fixed order, so that results are the same bits each time,
and finishes all small gradients at once instead of in ten launches. Blocks of a high rank run side
by side and find g in the cache; only the first of them reads x_0 and writes. ``B^T g`` sums over
features, not tokens: in one kernel with the sums over tokens it would leave partial sums of as many
bytes as g has, or more. So it stays a product of cuBLAS that reads g once more (2 of the 8 bytes),
like the small products with A.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankflow.adapters.kernels.launch import ceil_div, on_device, power_of_two
from rankflow.adapters.kernels.tiles import TINY, dot, dot_precision, sum_of_parts

_PROGRAMS = 512  # about four for each multiprocessor of the largest GPUs
_MIX = {"TOKENS": 64, "FEATURES": 64}
_GRADIENTS = {"TOKENS": 32, "FEATURES": 64, "STAGES": 3}
_FINISH = {"FEATURES": 32}


def split_gradients(tokens: int, out: int, rank: int, itemsize: int) -> tuple[int, int]:
    """Choose how many components and how many tokens a program takes, from shapes alone.

    Args:
        tokens: Tokens.
        out: Output features.
        rank: Components.
        itemsize: Bytes of an entry of the output.

    >>> split_gradients(4096, 4096, 32, 2)
    (32, 512)
    >>> split_gradients(4096, 14336, 384, 2)
    (128, 4096)
    >>> split_gradients(5, 7, 0, 4)
    (16, 32)
    """
    ranks = power_of_two(rank, 16, 256 // itemsize)
    step = _GRADIENTS["TOKENS"]
    programs = ceil_div(out, _GRADIENTS["FEATURES"]) * max(1, ceil_div(rank, ranks))
    splits = max(1, min(_PROGRAMS // programs, tokens // (4 * step)))
    return ranks, max(1, ceil_div(ceil_div(tokens, splits), step)) * step


@torch.library.custom_op("rankflow::mix", mutates_args=())
def mix(
    base: Tensor, hidden: Tensor, B: Tensor, factor: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """Return DoRA's output in the shape and type of ``base``.

    Args:
        base: Output of the base layer, bias included, shape ``(..., out)``, in any layout.
        hidden: ``A x`` in the type of ``base``, shape ``(rank, tokens)``.
        B: Shape ``(out, rank)``.
        factor: c, shape ``(out,)``.
        bias: The base layer's bias, shape ``(out,)``, or None.
        scale: s.
    """
    y = base.new_empty(base.shape)
    if y.numel() == 0:
        return y
    base = base.reshape(-1, base.shape[-1])
    tokens, out = base.shape
    ranks = power_of_two(B.shape[1], 16, 128 // base.element_size())
    grid = ceil_div(tokens, _MIX["TOKENS"]) * ceil_div(out, _MIX["FEATURES"])
    with on_device(base):
        _mix[(grid,)](
            *(base, hidden.contiguous(), B.contiguous(), factor, bias, y),
            *(tokens, out, B.shape[1], *base.stride(), scale),
            HAS_BIAS=bias is not None,
            PRECISION=dot_precision(base),
            RANKS=ranks,
            **_MIX,
            num_warps=4,
            num_stages=2,
        )
    return y


@mix.register_fake
def _(
    base: Tensor, hidden: Tensor, B: Tensor, factor: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    return base.new_empty(base.shape)


@torch.library.custom_op("rankflow::mix_gradients", mutates_args=())
def mix_gradients(
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

    Those of m and of the bias are float32.

    Args:
        g: Gradient of the output, shape ``(tokens, out)``, in any layout.
        base: Output of the base layer, shape ``(tokens, out)``, in any layout.
        hidden: As for `mix`.
        B: As for `mix`.
        factor: c, shape ``(out,)``.
        norms: n, shape ``(out,)``.
        bias: As for `mix`.
        scale: s.
        wants_base: Whether the first gradient is needed; otherwise it is empty.
        wants_bias: Whether the last gradient is needed; otherwise it is empty.
    """
    tokens, out = g.shape
    rank = B.shape[1]
    d_base, d_B, d_magnitude, d_bias = _empty_gradients(g, B, wants_base, wants_bias)
    if out == 0:
        return d_base, d_B, d_magnitude, d_bias
    hidden, B = hidden.contiguous(), B.contiguous()
    ranks, width = split_gradients(tokens, out, rank, g.element_size())
    splits = ceil_div(tokens, width)
    outer = factor.new_empty(splits, rank, out)
    along = factor.new_empty(splits, out)
    total = factor.new_empty(splits if wants_bias else 0, out)
    grid = (max(1, ceil_div(rank, ranks)), ceil_div(out, _GRADIENTS["FEATURES"]), splits)
    with on_device(g):
        if splits > 0:
            _partial_gradients[grid](
                *(g, base, hidden, factor, bias, d_base, outer, along, total),
                *(tokens, out, rank, *g.stride(), *base.stride(), width),
                HAS_BIAS=bias is not None,
                WANTS_BASE=wants_base,
                WANTS_BIAS=wants_bias,
                PRECISION=dot_precision(g),
                RANKS=ranks,
                **_GRADIENTS,
                num_warps=4,
            )
        _finish[(ceil_div(out, _FINISH["FEATURES"]),)](
            *(outer, along, total, B, factor, norms, d_B, d_magnitude, d_bias),
            *(out, rank, splits, scale),
            WANTS_BIAS=wants_bias,
            RANKS=min(32, ranks),
            **_FINISH,
            num_warps=4,
        )
    return d_base, d_B, d_magnitude, d_bias


@mix_gradients.register_fake
def _(
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
    return _empty_gradients(g, B, wants_base, wants_bias)


def _empty_gradients(
    g: Tensor, B: Tensor, wants_base: bool, wants_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return where gradients go; those that nobody wants are empty."""
    tokens, out = g.shape
    return (
        g.new_empty(tokens if wants_base else 0, out),
        B.new_empty(B.shape),
        g.new_empty(out, dtype=torch.float32),
        g.new_empty(out if wants_bias else 0, dtype=torch.float32),
    )


@triton.jit(do_not_specialize=["rank"])
def _mix(
    base: tl.tensor,
    hidden: tl.tensor,
    B: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    rank: tl.tensor,
    token_stride: tl.tensor,
    feature_stride: tl.tensor,
    scale: tl.tensor,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """Write a tile of the output."""
    across = tl.cdiv(out, FEATURES)
    js = (tl.program_id(0) % across) * FEATURES + tl.arange(0, FEATURES)
    ts = (tl.program_id(0) // across) * TOKENS + tl.arange(0, TOKENS)
    js_there, ts_there = js < out, ts < tokens
    there = ts_there[:, None] & js_there[None, :]
    wide_ts, wide_js = ts.to(tl.int64), js.to(tl.int64)
    x0 = tl.load(
        base + wide_ts[:, None] * token_stride + wide_js[None, :] * feature_stride, there, 0.0
    ).to(tl.float32)
    branch = tl.zeros((TOKENS, FEATURES), tl.float32)
    for start in range(0, rank, RANKS):
        ks = start + tl.arange(0, RANKS)
        h_tile = hidden + ks.to(tl.int64)[None, :] * tokens + ts[:, None]
        h = tl.load(h_tile, ts_there[:, None] & (ks < rank)[None, :], 0.0)
        b_tile = B + wide_js[None, :] * rank + ks[:, None]
        b = tl.load(b_tile, (ks < rank)[:, None] & js_there[None, :], 0.0)
        branch = dot(h, b.to(h.dtype), branch, PRECISION)
    c = tl.load(factor + js, js_there, 0.0)
    centred = x0
    if HAS_BIAS:
        centred = x0 - tl.load(bias + js, js_there, 0.0).to(tl.float32)[None, :]
    value = x0 + (c - 1.0)[None, :] * centred + (scale * c)[None, :] * branch
    tl.store(y + wide_ts[:, None] * out + js[None, :], value.to(y.dtype.element_ty), there)


@triton.jit(do_not_specialize=["rank"])
def _partial_gradients(
    g: tl.tensor,
    base: tl.tensor,
    hidden: tl.tensor,
    factor: tl.tensor,
    bias: tl.tensor,
    d_base: tl.tensor,
    outer: tl.tensor,
    along: tl.tensor,
    total: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    rank: tl.tensor,
    g_token_stride: tl.tensor,
    g_feature_stride: tl.tensor,
    base_token_stride: tl.tensor,
    base_feature_stride: tl.tensor,
    width: tl.tensor,
    HAS_BIAS: tl.constexpr,
    WANTS_BASE: tl.constexpr,
    WANTS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    TOKENS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """Write ``c g``, and sums of ``h g``, ``g (x_0 - b)`` and g over a run of tokens."""
    part, split = tl.program_id(0), tl.program_id(2)
    js = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    ks = part * RANKS + tl.arange(0, RANKS)
    js_there, ks_there = js < out, ks < rank
    wide_js = js.to(tl.int64)
    is_first = part == 0
    c = tl.load(factor + js, js_there, 0.0)
    offset = tl.zeros((FEATURES,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + js, js_there, 0.0).to(tl.float32)
    products = tl.zeros((RANKS, FEATURES), tl.float32)
    dots = tl.zeros((TOKENS, FEATURES), tl.float32)
    sums = tl.zeros((TOKENS, FEATURES), tl.float32)
    end = min(split * width + width, tokens)
    for start in tl.range(split * width, end, TOKENS, num_stages=STAGES):
        ts = start + tl.arange(0, TOKENS)
        there = (ts < tokens)[:, None] & js_there[None, :]
        wide_ts = ts.to(tl.int64)[:, None]
        g_tile = g + wide_ts * g_token_stride + wide_js[None, :] * g_feature_stride
        slope = tl.load(g_tile, there, 0.0)
        h_tile = hidden + ks.to(tl.int64)[:, None] * tokens + ts[None, :]
        h = tl.load(h_tile, ks_there[:, None] & (ts < tokens)[None, :], 0.0)
        products = dot(h, slope, products, PRECISION)
        slope = slope.to(tl.float32)
        x_tile = base + wide_ts * base_token_stride + wide_js[None, :] * base_feature_stride
        x0 = tl.load(x_tile, there & is_first, 0.0).to(tl.float32)
        dots += slope * (x0 - offset[None, :])
        if WANTS_BIAS:
            sums += slope
        if WANTS_BASE:
            value = (c[None, :] * slope).to(d_base.dtype.element_ty)
            tl.store(d_base + wide_ts * out + js[None, :], value, there & is_first)
    place = split.to(tl.int64)
    outer_tile = outer + (place * rank + ks)[:, None] * out + js[None, :]
    tl.store(outer_tile, products, ks_there[:, None] & js_there[None, :])
    tl.store(along + place * out + js, tl.sum(dots, 0), js_there & is_first)
    if WANTS_BIAS:
        tl.store(total + place * out + js, tl.sum(sums, 0), js_there & is_first)


@triton.jit(do_not_specialize=["rank", "splits"])
def _finish(
    outer: tl.tensor,
    along: tl.tensor,
    total: tl.tensor,
    B: tl.tensor,
    factor: tl.tensor,
    norms: tl.tensor,
    d_B: tl.tensor,
    d_magnitude: tl.tensor,
    d_bias: tl.tensor,
    out: tl.tensor,
    rank: tl.tensor,
    splits: tl.tensor,
    scale: tl.tensor,
    WANTS_BIAS: tl.constexpr,
    FEATURES: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """Add the partial sums of some output features, and write their small gradients."""
    js = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    there = js < out
    c = tl.load(factor + js, there, 0.0)
    dots = sum_of_parts(along, splits, js, out)
    for start in range(0, rank, RANKS):
        ks = start + tl.arange(0, RANKS)
        mask = (ks < rank)[:, None] & there[None, :]
        products = tl.zeros((RANKS, FEATURES), tl.float32)
        for split in tl.range(splits, num_stages=4):
            row = tl.cast(split, tl.int64) * rank + ks
            products += tl.load(outer + row[:, None] * out + js[None, :], mask, 0.0)
        tile = js.to(tl.int64)[None, :] * rank + ks[:, None]
        b = tl.load(B + tile, mask, 0.0).to(tl.float32)
        dots += scale * tl.sum(products * b, 0)
        value = products * (scale * c)[None, :]
        tl.store(d_B + tile, value.to(d_B.dtype.element_ty), mask)
    n = tl.load(norms + js, there, 1.0)
    # A row of zeros has no direction.
    is_zero = n <= TINY
    tl.store(d_magnitude + js, tl.where(is_zero, 0.0, dots / n), there)
    if WANTS_BIAS:
        tl.store(d_bias + js, (1.0 - c) * sum_of_parts(total, splits, js, out), there)
