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
* on a GPU that Triton works on, kernels take the norm from one reading of the weight, and the
  output and its gradients from one reading of the base layer's output;
* the norm is computed once for each state of the weights: gradient accumulation, checkpointing and
  evaluation reuse it. A write through ``.data`` that no optimizer made leaves no trace: call
  ``accelerate_dora`` again after one;
* an input in lower precision than the adapter is read as it is, without PEFT's copy.

Dropout acts on the low-rank branch alone. PEFT also drops the input of ``(c - 1) W x``, which takes
a second product with W; the expectation is the same.
"""

from collections.abc import Callable
from functools import partial
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
from rankflow.adapters.gate import GatedVariant, apply_B, effective_B
from rankflow.adapters.norm_cache import Epoch, NormCache
from rankflow.adapters.row_norms import measure_norms, own_precision
from rankflow.adapters.sites import Site, find_sites
from rankflow.errors import SiteError


def accelerate_dora(model: nn.Module, adapter_name: str = "default") -> int:
    """Replace the arithmetic of every DoRA site; nothing else about the model changes.

    Called again, it forgets all norms that it remembers.

    Args:
        model: A ``PeftModel`` with a DoRA adapter, steered by RankFlow or not.
        adapter_name: The adapter.

    Returns:
        The number of sites that use the fast forward, as soon as they have components and a
        magnitude.

    Raises:
        SiteError: The model has no DoRA site of that adapter.
    """
    sites = [site for site in find_sites(model, adapter_name) if site.magnitude_slot is not None]
    if not sites:
        raise SiteError(
            f"adapter {adapter_name!r} has no DoRA site to accelerate; make it with "
            "LoraConfig(use_dora=True)"
        )
    for site in sites:
        accelerate_site(site)
        site.dora_variant.cache = NormCache()
    return len(sites)


def accelerate_site(site: Site) -> None:
    """Give one DoRA site the fast forward; where it has it, keep it and the norms it remembers.

    Args:
        site: A site of a DoRA adapter. One that is dead, or whose magnitude is off, computes by the
            fast forward as soon as it computes as DoRA again.
    """
    Epoch.watch_optimizers()
    variant = site.dora_variant
    fast = _fast(variant)
    if fast is not variant:
        site.dora_variant = fast
    if isinstance(fast, FastLinear) and site.layer.cast_input_dtype_enabled is True:
        site.layer.cast_input_dtype_enabled = _CastForNeighbours(site.layer)


def norms_of(site: Site) -> Tensor:
    """Return the norm of each output row of ``W + s B A``, shape ``(out,)``, not to be changed.

    It costs nothing where the fast forward is installed and has run since the weights changed.

    Args:
        site: A site of a DoRA adapter.
    """
    A, B = site.A, site.effective_B
    variant = site.dora_variant
    if isinstance(variant, FastLinear | _FastConv | FastEmbedding):
        return variant.cache.norms(site.layer, site.adapter_name, A, B)
    return measure_norms(site.layer, A, B, site.scale)


def norms_reader(site: Site) -> Callable[[], Tensor]:
    """Return what reads the norms of the last forward, like ``norms_of``, until the next resize.

    To find and compare a layer's tensors takes a hundred times as long as to look at the step.

    Args:
        site: A site of a DoRA adapter, as the last resize left it.
    """
    variant = site.dora_variant
    if not isinstance(variant, FastLinear | _FastConv | FastEmbedding):
        return partial(norms_of, site)
    variant.cache.expire()

    def read() -> Tensor:
        latest = variant.cache.latest()
        return norms_of(site) if latest is None else latest

    return read


def row_factor(site: Site) -> Tensor:
    """Return the factor ``m / n`` of each output row, shape ``(out,)``, of a DoRA site.

    Where the site has slots it is that of the event under way.
    """
    if site.slots is not None:
        assert site.slots.row_factor is not None, "an event measures it first"
        return site.slots.row_factor
    assert site.magnitude is not None, "the site computes as LoRA"
    return magnitude_factor(site.magnitude.detach(), norms_of(site))


class FastLinear(DoraLinearVariant):
    """DoRA on linear layers, quantised ones and transformers' ``Conv1D`` included."""

    def __init__(self) -> None:
        self.cache = NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        A, B = module.lora_A[active_adapter].weight, effective_B(module, active_adapter)
        scale = module.scaling[active_adapter]
        norms = self.cache.norms(module, active_adapter, A, B)
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
        self.cache = NormCache()

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
    """Return the fast form of a DoRA variant, or the variant itself where it is fast."""
    return _FAST[type(variant)]() if type(variant) in _FAST else variant


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
        inner = [v.inner if isinstance(v, GatedVariant) else v for v in variants]
        return not all(isinstance(variant, (FastLinear, DeadVariant)) for variant in inner)
