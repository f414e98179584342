"""What a site of rank 0 does inside PEFT, which itself assumes at least one component.

With A of shape ``(0, in)`` stock PEFT multiplies empty matrices in every forward, cannot merge,
fails in convolutions with DoRA, and saves empty tensors that it cannot load. A dead site therefore
gets its own variant, through PEFT's plug ``layer.lora_variant``:

* without a magnitude it passes the base output through;
* with a magnitude it is ``m / ||W|| * (W x) + bias``, DoRA with an empty direction.
"""

from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from rankflow.adapters.base_weight import magnitude_factor, over_rows, row_norms
from rankflow.adapters.gate import stored_factors
from rankflow.adapters.norm_cache import NormCache


class DeadVariant(LoraVariant):
    """The forward and the merging of a site without components.

    Args:
        revived: The variant to put back when the site gets components again; None is plain LoRA.
    """

    def __init__(self, revived: LoraVariant | None) -> None:
        self.revived = revived
        self._cache = NormCache()

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        if not has_magnitude(module, active_adapter):
            return result
        A, B, *_ = stored_factors(module, active_adapter)
        norms = self._cache.norms(module, active_adapter, A, B)
        scale = magnitude_factor(module.lora_magnitude_vector[active_adapter].weight, norms)
        base = module.get_base_layer()
        bias = getattr(base, "bias", None)
        if isinstance(base, nn.modules.conv._ConvNd):
            per_channel = (-1, *[1] * len(base.kernel_size))
            scale = scale.view(per_channel)
            bias = None if bias is None else bias.view(per_channel)
        scale = scale.to(result.dtype)
        return result * scale if bias is None else (result - bias) * scale + bias

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight as a new tensor."""
        if not has_magnitude(module, active_adapter):
            return orig_weight.clone()
        factor = _merging_factor(module, active_adapter, safe_merge=True)
        # PEFT copied the weight before the other merged adapters were taken out and put back.
        weight = dequantize_module_weight(module.get_base_layer()).detach()
        return (weight * over_rows(module, factor)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into ``orig_weight`` in place."""
        if has_magnitude(module, active_adapter):
            factor = _merging_factor(module, active_adapter, safe_merge=False)
            merged = orig_weight.data * over_rows(module, factor)
            orig_weight.data = merged.to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it was before the merge."""
        if not has_magnitude(module, active_adapter):
            return orig_weight
        factor = module._cache_pop(f"{active_adapter}-dead")
        return (orig_weight.data / over_rows(module, factor)).to(orig_weight.dtype)


def has_magnitude(layer: LoraLayer, adapter_name: str) -> bool:
    """Whether an adapter scales the layer's rows: it is DoRA's, and its magnitude is not off."""
    vectors = layer.lora_magnitude_vector
    return adapter_name in vectors and vectors[adapter_name].weight.numel() > 0


def _merging_factor(module: LoraLayer, adapter_name: str, *, safe_merge: bool) -> Tensor:
    """Return the factor on the weight without other merged adapters, and keep it for unmerging."""
    with module._unmerged_base_weight(safe_merge=safe_merge) as weight:
        magnitude = module.lora_magnitude_vector[adapter_name].weight
        factor = magnitude_factor(magnitude, row_norms(module, weight)).detach()
    module._cache_store(f"{adapter_name}-dead", factor)
    return factor
