r"""DoRA's forward at the cost of LoRA's: the dense product ``B A`` never exists.

DoRA computes :math:`y = c \odot (W x + s B A x) + b` with :math:`c_j = m_j / n_j` and
:math:`n_j = \lVert (W + s B A)_j \rVert`, where the norm is held constant in backward
(arXiv 2402.09353, section 4.3). PEFT forms ``B A`` by pushing an identity matrix through the
adapter, at every forward. Here

* the base layer's output is scaled and the low-rank branch added to it in one pass, with ``s c``
  folded into B;
* backward keeps what is alive anyway: the input, ``A x``, and the output (:math:`y = c z` gives
  :math:`z` back, so the gradient of m needs no second copy);
* the norm is taken over tiles of a few rows, which costs the arithmetic of a dense product and none
  of its memory. Expanding the square would need no tile either, but loses all digits where W and
  ``s B A`` nearly cancel;
* the norm is computed once for each state of the weights: gradient accumulation, checkpointing and
  evaluation reuse it.

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
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.optim.optimizer import register_optimizer_step_post_hook

from rankflow.adapters.base_weight import output_axis
from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.sites import find_sites
from rankflow.errors import SiteError

# Small enough for a core's cache; a GPU wants few launches instead.
_TILE_BYTES = {"cpu": 2**18}
_TILE_BYTES_ELSEWHERE = 2**25

# A magnitude of exactly 0 would hide z from backward (y = c z); this is 0 to every purpose.
_SMALLEST_FACTOR = 1e-20


def accelerate_dora(model: nn.Module, adapter_name: str = "default") -> int:
    """Replace the arithmetic of every DoRA site; nothing else about the model changes.

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
        current = variants[adapter_name]
        if isinstance(current, DeadVariant):
            current.revived = _fast(current.revived)
        else:
            variants[adapter_name] = _fast(current)
        # PEFT would copy the input in the adapter's precision, where only A's copy is needed.
        if len(site.layer.lora_variant) == len(site.layer.scaling) == 1:
            site.layer.cast_input_dtype_enabled = False
    return len(sites)


def row_norms_of_sum(
    weight: Tensor, A: Tensor, B: Tensor, scale: float, *, axis: int = 0
) -> Tensor:
    r"""Norm of each output row of :math:`W + s B A`, without forming the sum.

    Args:
        weight: W, ``(out, in)`` for ``axis`` 0 and ``(in, out)`` for 1.
        A: Right factor, ``(rank, in)``.
        B: Left factor, ``(out, rank)``.
        scale: s.
        axis: Axis of the weight that runs over output features.

    Returns:
        Norms, shape ``(out,)``, at least float32, and never 0.
    """
    dtype = torch.promote_types(torch.promote_types(weight.dtype, A.dtype), torch.float32)
    A, B = A.to(dtype), B.to(dtype)
    limit = _TILE_BYTES.get(weight.device.type, _TILE_BYTES_ELSEWHERE)
    lines = max(1, limit // (weight.shape[1] * dtype.itemsize))
    left, right = (B, A) if axis == 0 else (A.T, B.T)
    tiles = zip(weight.split(lines), left.split(lines), strict=True)
    squares = [
        torch.addmm(tile.to(dtype), factor, right, alpha=scale).square_().sum(dim=1 - axis)
        for tile, factor in tiles
    ]
    total = torch.cat(squares) if axis == 0 else torch.stack(squares).sum(dim=0)
    return total.sqrt().clamp_min(torch.finfo(dtype).tiny)


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
    """The norms of one site, computed anew whenever one of its weights may have changed."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] | None = None
        self._norms: Tensor | None = None

    def norms(self, layer: LoraLayer, A: Tensor, B: Tensor, scale: float) -> Tensor:
        """Return the norms of ``W + s B A``, shape ``(out,)``."""
        if torch.compiler.is_compiling():
            return measure_norms(layer, A, B, scale)
        weight = layer.get_base_layer().weight
        key = (_Epoch.steps, scale, *map(_identity, (weight, A, B)))
        if self._norms is None or key != self._key:
            self._norms, self._key = measure_norms(layer, A, B, scale), key
        return self._norms


@torch.no_grad()
def measure_norms(layer: LoraLayer, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Return the norm of each output row of a layer's ``W + s B A``, shape ``(out,)``.

    Args:
        layer: The adapted layer.
        A: Its right factor, as PEFT stores it.
        B: Its left factor, as PEFT stores it.
        scale: s.
    """
    weight = dequantize_module_weight(layer.get_base_layer()).detach().flatten(1)
    with _own_precision(weight):
        return row_norms_of_sum(weight, A.flatten(1), B.flatten(1), scale, axis=output_axis(layer))


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
        flat, inputs = (
            base.flatten(0, -2),
            x.flatten(0, -2).to(dtype),
        )  # (tokens, out), (tokens, in)
        factor = _factor(magnitude, norms)
        # In low precision c - 1 is exact to more digits than c, which is near 1.
        excess = (factor - 1).to(dtype)
        hidden = inputs @ A.to(dtype).T  # (tokens, rank)
        scaled = (B * (scale * factor).unsqueeze(1)).to(dtype)
        y = torch.addcmul(flat, flat, excess)
        y.addmm_(hidden, scaled.T)
        if bias is not None:
            y.sub_(excess * bias.to(dtype))
        ctx.save_for_backward(
            y if bias is None else flat, inputs, hidden, A, B, magnitude, bias, norms, factor
        )
        ctx.scale = scale
        ctx.shapes = (base.shape, x.shape, x.dtype)
        return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of all inputs that want one."""
        kept, inputs, hidden, A, B, magnitude, bias, norms, factor = ctx.saved_tensors
        base_shape, x_shape, x_dtype = ctx.shapes
        g = gradient.flatten(0, -2)  # (tokens, out)
        dtype = g.dtype
        excess = (factor - 1).to(dtype)
        wide = factor.dtype
        outer = (g.T @ hidden).to(wide)  # (out, rank)
        weighted = torch.mul(g, kept)
        total = weighted.sum(dim=0, dtype=wide)
        if bias is None:
            d_magnitude = total / (factor * norms)
        else:
            offset = bias.to(wide) * g.sum(dim=0, dtype=wide)
            branch = ctx.scale * (outer * B.to(wide)).sum(dim=1)
            d_magnitude = (total - offset + branch) / norms
        d_hidden = g @ (B * (ctx.scale * factor).unsqueeze(1)).to(dtype)  # (tokens, rank)
        d_base = d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            d_base = torch.addcmul(g, g, excess, out=weighted).view(base_shape)
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


def _factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Return c = m / n in the norms' precision, never exactly 0."""
    factor = magnitude.flatten().to(norms.dtype) / norms
    return torch.where(factor.abs() < _SMALLEST_FACTOR, _SMALLEST_FACTOR, factor)


class FastLinear(DoraLinearVariant):
    """DoRA on linear layers, quantised ones and transformers' ``Conv1D`` included."""

    def __init__(self) -> None:
        self.cache = _NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, A, B, scale)
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
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, lora_A.weight, lora_B.weight, scale)
        channels = (-1, *[1] * (result.ndim - 2))
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = (magnitude.flatten().to(norms.dtype) / norms).view(channels)
        branch = lora_B(lora_A(module.lora_dropout[active_adapter](x))) * scale
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
        A, B = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, A, B, scale)
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = (magnitude.flatten().to(norms.dtype) / norms).to(result.dtype)
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
    """Return the fast form of one of PEFT's DoRA variants; a fast one stays."""
    make = _FAST.get(type(variant))
    return variant if make is None else make()
