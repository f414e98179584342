r"""DoRA's forward at the cost of LoRA's: the dense product ``B A`` never exists.

DoRA computes :math:`y = c \odot (W x + s B A x) + b` with :math:`c_j = m_j / n_j` and
:math:`n_j = \lVert (W + s B A)_j \rVert`, where the norm is held constant in backward
(arXiv 2402.09353, section 4.3). PEFT forms ``B A`` by pushing an identity matrix through the
adapter, at every forward. Here

* the base layer's output is scaled and the low-rank branch added to it in one pass, with ``s c``
  folded into B;
* backward keeps the input, ``A x`` and the base layer's output, and nothing of the weight's size;
* the norm comes from an expanded square, or from tiles of a few rows where that would cancel; both
  cost the arithmetic of a dense product and none of its memory;
* the norm is computed once for each state of the weights: gradient accumulation, checkpointing and
  evaluation reuse it. A write through ``.data`` that no optimizer made leaves no trace: call
  ``accelerate_dora`` again after one.

Dropout acts on the low-rank branch alone. PEFT also drops the input of ``(c - 1) W x``, which takes
a second product with W; the expectation is the same.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankflow.adapters.base_weight import (
    dense_weight,
    is_zero_row,
    magnitude_factor,
    output_axis,
)
from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.gate import GatedVariant, apply_B, effective_B, stored_factors
from rankflow.adapters.sites import find_sites
from rankflow.errors import SiteError

# Small enough for a core's cache; a GPU wants few launches instead.
_TILE_BYTES = {"cpu": 2**19}
_TILE_BYTES_ELSEWHERE = 2**25

# Rows whose square is below this share of its terms are summed without expanding it: 1e-2 costs
# at most two of float32's seven digits, and bfloat16 has none to lose.
_CANCELLED = 1e-2
_CANCELLED_LOW = 0.5


def accelerate_dora(model: nn.Module, adapter_name: str = "default") -> int:
    """Replace the arithmetic of every DoRA site; nothing else about the model changes.

    Called again, it forgets all norms that it remembers.

    Args:
        model: A ``PeftModel`` with a DoRA adapter, steered by RankFlow or not.
        adapter_name: The adapter.

    Returns:
        The number of sites that use the fast forward.

    Raises:
        SiteError: The model has no DoRA site of that adapter.
    """
    sites = [site for site in find_sites(model, adapter_name) if site.magnitude is not None]
    if not sites:
        raise SiteError(
            f"adapter {adapter_name!r} has no DoRA site to accelerate; make it with "
            "LoraConfig(use_dora=True)"
        )
    _Epoch.watch_optimizers()
    for site in sites:
        variants = site.layer.lora_variant
        variants[adapter_name] = _fast(variants[adapter_name])
    return len(sites)


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

    On a CPU the square is expanded,

    .. math:: n_j^2 = \lVert W_j \rVert^2 + 2 s \sum_k B_{jk} (W A^\top)_{jk}
        + s^2 (B A A^\top B^\top)_{jj},

    and rows in which these terms nearly cancel are taken again from their sum. Elsewhere asking
    whether there are such rows would wait for the device, so all rows are summed, tile by tile.

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
    A, B = _widened(A, weight), _widened(B, weight)
    if axis == 1 or weight.device.type != "cpu" or torch.compiler.is_compiling():
        total = _sum_of_squares(weight, A, B, scale, axis)
    else:
        total = _expanded_squares(weight, A, B, scale, squares)
    return total.sqrt().clamp_min(torch.finfo(A.dtype).tiny)


def _expanded_squares(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, squares: Tensor | None
) -> Tensor:
    if squares is None:
        squares = _sum_of_squares(weight, A[:0], B[:, :0], scale, axis=0)
    mixed = (weight @ A.to(weight.dtype).T).to(B.dtype)  # (out, rank)
    cross = 2 * scale * (B * mixed).sum(dim=1)
    own = scale**2 * ((B @ (A @ A.T)) * B).sum(dim=1)
    total = squares + cross + own
    # Their sum has lost a share of its digits; in low precision W A^T had few to begin with.
    worst = _CANCELLED if weight.dtype.itemsize >= 4 else _CANCELLED_LOW
    for rows in (total < worst * (squares + own)).nonzero().flatten().split(_lines(weight, B)):
        total[rows] = _sum_of_squares(weight[rows], A, B[rows], scale, axis=0)
    return total


def _sum_of_squares(weight: Tensor, A: Tensor, B: Tensor, scale: float, axis: int) -> Tensor:
    left, right = (B, A) if axis == 0 else (A.T, B.T)
    lines = _lines(weight, B)
    tiles = zip(weight.split(lines), left.split(lines), strict=True)
    parts = [
        torch.addmm(tile.to(B.dtype), factor, right, alpha=scale).square_().sum(dim=1 - axis)
        for tile, factor in tiles
    ]
    return torch.cat(parts) if axis == 0 else torch.stack(parts).sum(dim=0)


def _widened(factor: Tensor, weight: Tensor) -> Tensor:
    """Convert a factor to the precision of the norms: its own or W's, at least float32."""
    dtype = torch.promote_types(weight.dtype, factor.dtype)
    return factor.to(torch.promote_types(dtype, torch.float32))


def _lines(weight: Tensor, B: Tensor) -> int:
    """Lines of the weight that fill a tile."""
    limit = _TILE_BYTES.get(weight.device.type, _TILE_BYTES_ELSEWHERE)
    return max(1, limit // (weight.shape[1] * B.dtype.itemsize))


class _Epoch:
    """Counts optimizer steps of any optimizer: fused ones change weights and leave no trace."""

    steps = 0
    _watching = False

    @classmethod
    def watch_optimizers(cls) -> None:
        """Count from now on; once is enough for a process."""
        if not cls._watching:
            register_optimizer_step_post_hook(cls._count)
            cls._watching = True

    @classmethod
    def _count(cls, *_: Any) -> None:
        cls.steps += 1


class _NormCache:
    """The norms of one site, computed anew whenever one of its weights may have changed.

    It holds on to the storages that it has seen, so that no new tensor can take their address.
    """

    def __init__(self) -> None:
        self._seen: tuple[object, ...] = ()
        self._norms: Tensor | None = None
        self._seen_weight: tuple[object, ...] = ()
        self._squares: Tensor | None = None

    def __reduce__(self) -> tuple[type["_NormCache"], tuple[()]]:
        """Copy and pickle as an empty cache."""
        return _NormCache, ()

    def norms(self, layer: LoraLayer, adapter_name: str, A: Tensor, B: Tensor) -> Tensor:
        """Return the norms of ``W + s B A``, shape ``(out,)``; B has its gate folded in."""
        scale = layer.scaling[adapter_name]
        if torch.compiler.is_compiling():
            return measure_norms(layer, A, B, scale)
        factors = stored_factors(layer, adapter_name)
        weight = layer.get_base_layer().weight
        seen_weight = (_identity(weight), _Epoch.steps if weight.requires_grad else None)
        seen = (_Epoch.steps, scale, seen_weight, *(_identity(factor) for factor in factors))
        if self._norms is None or seen != self._seen:
            with torch.inference_mode(False):  # training may follow
                if seen_weight != self._seen_weight:
                    self._squares = _squares_of(layer, A, B)
                    self._seen_weight = seen_weight
                self._norms = measure_norms(layer, A, B, scale, squares=self._squares)
            self._seen = seen
            self._alive = [tensor.untyped_storage() for tensor in (weight, *factors)]
        return self._norms


@torch.no_grad()
def _squares_of(layer: LoraLayer, A: Tensor, B: Tensor) -> Tensor:
    """Return the squared norm of each row of W alone."""
    weight = dense_weight(layer).detach().flatten(1)
    A, B = (_widened(t.detach().flatten(1), weight) for t in (A, B))
    return _sum_of_squares(weight, A[:0], B[:, :0], 0.0, output_axis(layer))


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
    with _own_precision(weight):
        return row_norms_of_sum(
            weight,
            A.detach().flatten(1),
            B.detach().flatten(1),
            scale,
            axis=output_axis(layer),
            squares=squares,
        )


def _own_precision(tensor: Tensor) -> AbstractContextManager[None]:
    """Keep autocast, where the device has it, from choosing the precision of what follows."""
    kind = tensor.device.type
    if torch.amp.is_autocast_available(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def _identity(tensor: Tensor) -> tuple[object, ...]:
    """What changes when a tensor is written to in place, replaced, moved or converted."""
    version = 0 if tensor.is_inference() else tensor._version
    return tensor.data_ptr(), version, tensor.dtype, tensor.device, tensor.shape


class _Compose(torch.autograd.Function):
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
        inputs = x.flatten(0, -2).to(dtype)  # (tokens, in)
        factor = magnitude_factor(magnitude, norms)
        # In low precision c - 1 is exact to more digits than c, which is near 1.
        excess = (factor - 1).to(dtype)
        hidden = inputs @ A.to(dtype).T  # (tokens, rank)
        scaled = (B * (scale * factor).unsqueeze(1)).to(dtype)
        y = torch.addcmul(base, base, excess).contiguous()
        y.view(-1, len(B)).addmm_(hidden, scaled.T)
        if bias is not None:
            y.sub_(excess * bias.to(dtype))
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
        g = gradient.flatten(0, -2)  # (tokens, out)
        dtype, wide = g.dtype, factor.dtype
        excess = (factor - 1).to(dtype)
        outer = (g.T @ hidden).to(wide)  # (out, rank)
        weighted = torch.mul(g, base.flatten(0, -2))
        along = weighted.sum(dim=0, dtype=wide) + ctx.scale * (outer * B.to(wide)).sum(dim=1)
        if bias is not None:
            along = along - bias.to(wide) * g.sum(dim=0, dtype=wide)
        d_magnitude = torch.where(is_zero_row(norms), 0, along / norms)
        d_hidden = g @ (B * (ctx.scale * factor).unsqueeze(1)).to(dtype)  # (tokens, rank)
        d_base = d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            d_base = torch.addcmul(g, g, excess, out=weighted).view(base.shape)
        if ctx.needs_input_grad[1]:
            d_x = (d_hidden @ A.to(dtype)).to(x_dtype).view(x_shape)
        if bias is not None and ctx.needs_input_grad[5]:
            d_bias = ((1 - factor) * g.sum(dim=0, dtype=wide)).to(bias.dtype)
        return (
            d_base,
            d_x,
            (d_hidden.T @ inputs).to(A.dtype),
            (outer * (ctx.scale * factor).unsqueeze(1)).to(B.dtype),
            d_magnitude.to(magnitude.dtype).view(magnitude.shape),
            d_bias,
            None,
            None,
        )


class FastLinear(DoraLinearVariant):
    """DoRA on linear layers, quantised ones and transformers' ``Conv1D`` included."""

    def __init__(self) -> None:
        self.cache = _NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        A, B = module.lora_A[active_adapter].weight, effective_B(module, active_adapter)
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, active_adapter, A, B)
        with _own_precision(result):
            return _Compose.apply(
                result,
                module.lora_dropout[active_adapter](x),
                A,
                B,
                module.lora_magnitude_vector[active_adapter].weight,
                module.get_base_layer().bias,
                norms,
                scale,
            )


class _FastConv:
    """The forward shared by convolutions of every dimension."""

    def __init__(self) -> None:
        self.cache = _NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        lora_A, B = module.lora_A[active_adapter], effective_B(module, active_adapter)
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, active_adapter, lora_A.weight, B)
        channels = (-1, *[1] * (result.ndim - 2))
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude_factor(magnitude, norms).view(channels)
        x = module._cast_input_dtype(x, lora_A.weight.dtype)
        hidden = lora_A(module.lora_dropout[active_adapter](x))
        branch = apply_B(module, active_adapter, hidden, B) * scale
        bias = module.get_base_layer().bias
        if bias is not None:
            result = result - bias.view(channels)
        y = (result + branch) * factor.to(result.dtype)
        return y if bias is None else y + bias.view(channels)


class FastConv1d(_FastConv, DoraConv1dVariant):
    """DoRA on one-dimensional convolutions."""


class FastConv2d(_FastConv, DoraConv2dVariant):
    """DoRA on two-dimensional convolutions."""


class FastConv3d(_FastConv, DoraConv3dVariant):
    """DoRA on three-dimensional convolutions."""


class FastEmbedding(DoraEmbeddingVariant):
    """DoRA on embeddings."""

    def __init__(self) -> None:
        self.cache = _NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        A, B = module.lora_embedding_A[active_adapter], effective_B(module, active_adapter)
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, active_adapter, A, B)
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude_factor(magnitude, norms).to(result.dtype)
        branch = functional.linear(module._embed(x, A.T), B) * scale
        embed_scale = module._get_embed_scale()
        if embed_scale is not None:  # the base layer's output holds it already
            branch = branch * embed_scale.to(branch.dtype)
        return (result + branch) * factor


_FAST = {
    DoraLinearVariant: FastLinear,
    DoraConv1dVariant: FastConv1d,
    DoraConv2dVariant: FastConv2d,
    DoraConv3dVariant: FastConv3d,
    DoraEmbeddingVariant: FastEmbedding,
}


def _fast(variant: Any) -> Any:
    """Return the fast form of a DoRA variant, PEFT's or fast already, with nothing remembered."""
    if isinstance(variant, DeadVariant):
        return DeadVariant(_fast(variant.revived))
    if isinstance(variant, GatedVariant):
        return GatedVariant(_fast(variant.inner))
    make: Any = _FAST.get(type(variant), type(variant))
    return make()
