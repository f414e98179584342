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
  ``accelerate_dora`` again after one;
* an input in lower precision than the adapter is read as it is, without PEFT's copy.

Dropout acts on the low-rank branch alone. PEFT also drops the input of ``(c - 1) W x``, which takes
a second product with W; the expectation is the same.
"""

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn
from torch.nn import functional

from rankflow.adapters.base_weight import magnitude_factor
from rankflow.adapters.compose import Compose
from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.norm_cache import Epoch, NormCache
from rankflow.adapters.row_norms import measure_norms as measure_norms
from rankflow.adapters.row_norms import own_precision
from rankflow.adapters.sites import find_sites
from rankflow.errors import SiteError


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
    for site in sites:
        accelerate_site(site.layer, adapter_name)
        _fast_variant(site.layer, adapter_name).cache = NormCache()
    return len(sites)


def accelerate_site(layer: LoraLayer, adapter_name: str) -> None:
    """Give one DoRA site the fast forward; where it has it, keep it and the norms it remembers.

    Args:
        layer: An adapted layer.
        adapter_name: Its adapter, with a magnitude. A dead site gets the forward at its revival.
    """
    Epoch.watch_optimizers()
    variants = layer.lora_variant
    current = variants[adapter_name]
    if isinstance(current, DeadVariant):
        current.revived = _fast(current.revived)
    else:
        variants[adapter_name] = _fast(current)
    is_linear = isinstance(_fast_variant(layer, adapter_name), FastLinear)
    if is_linear and layer.cast_input_dtype_enabled is True:
        layer.cast_input_dtype_enabled = _CastForNeighbours(layer)


def norms_of(layer: LoraLayer, adapter_name: str) -> Tensor:
    """Return the norm of each output row of ``W + s B A``, shape ``(out,)``, not to be changed.

    It costs nothing where the fast forward is installed and has run since the weights changed.

    Args:
        layer: The adapted layer.
        adapter_name: Its adapter.
    """
    A, B = _factors(layer, adapter_name)
    scale = layer.scaling[adapter_name]
    fast = _fast_variant(layer, adapter_name)
    return (
        measure_norms(layer, A, B, scale) if fast is None else fast.cache.norms(layer, A, B, scale)
    )


class FastLinear(DoraLinearVariant):
    """DoRA on linear layers, quantised ones and transformers' ``Conv1D`` included."""

    def __init__(self) -> None:
        self.cache = NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        A, B = module.lora_A[active_adapter].weight, module.lora_B[active_adapter].weight
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, A, B, scale)
        with own_precision(result):
            return Compose.apply(
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
        self.cache = NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        lora_A, lora_B = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, lora_A.weight, lora_B.weight, scale)
        channels = (-1, *[1] * (result.ndim - 2))
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude_factor(magnitude, norms).view(channels)
        x = module._cast_input_dtype(x, lora_A.weight.dtype)
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
        self.cache = NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        A, B = module.lora_embedding_A[active_adapter], module.lora_embedding_B[active_adapter]
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, A, B, scale)
        magnitude = module.lora_magnitude_vector[active_adapter].weight
        factor = magnitude_factor(magnitude, norms).to(result.dtype)
        branch = functional.linear(module._embed(x, A.T), B) * scale
        embed_scale = module._get_embed_scale()
        if embed_scale is not None:  # the base layer's output holds it already
            branch = branch * embed_scale.to(branch.dtype)
        return (result + branch) * factor


_Fast = FastLinear | _FastConv | FastEmbedding

_FAST = {
    DoraLinearVariant: FastLinear,
    DoraConv1dVariant: FastConv1d,
    DoraConv2dVariant: FastConv2d,
    DoraConv3dVariant: FastConv3d,
    DoraEmbeddingVariant: FastEmbedding,
}


def _fast(variant: Any) -> Any:
    """Return the fast form of a DoRA variant, or the variant itself where it is fast."""
    return _FAST[type(variant)]() if type(variant) in _FAST else variant


def _fast_variant(layer: LoraLayer, adapter_name: str) -> Any:
    """Return the fast variant of a site, asleep or not, or None if it has none."""
    variant = layer.lora_variant.get(adapter_name)
    if isinstance(variant, DeadVariant):
        variant = variant.revived
    return variant if isinstance(variant, _Fast) else None


def _factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """Return A and B as PEFT stores them."""
    if adapter_name in layer.lora_embedding_A:
        return layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name]
    return layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight


class _CastForNeighbours:
    """Tells PEFT whether to convert a layer's input to the adapters' type.

    The fast forward computes in the base layer's type and wants no copy; a neighbour does. It looks
    at each call, for adapters come and go, and holds no reference to the layer, whose memory would
    otherwise wait for the garbage collector.
    """

    def __init__(self, layer: LoraLayer) -> None:
        self._adapters, self._variants = layer.lora_A, layer.lora_variant

    def __bool__(self) -> bool:
        variants = [self._variants.get(name) for name in self._adapters]
        return not all(isinstance(variant, (FastLinear, DeadVariant)) for variant in variants)
