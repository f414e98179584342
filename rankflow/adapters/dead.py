"""What a site of rank 0 does inside PEFT, which itself assumes at least one component.

With A of shape ``(0, in)`` stock PEFT multiplies empty matrices in every forward, cannot merge,
fails in convolutions with DoRA, and saves empty tensors that it cannot load. A dead site therefore
gets its own variant, through PEFT's plug ``layer.lora_variant``:

* without a magnitude it passes the base output through;
* with a magnitude it is ``m / ||W|| * (W x) + bias``, DoRA with an empty direction.

In a state dict a dead LoRA site is absent, and a dead DoRA site appears with one component of
zeros: both are the same function, and stock PEFT loads both.
"""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from rankflow.adapters.base_weight import magnitude_factor, over_rows, row_norms


class DeadVariant(LoraVariant):
    """The forward and the merging of a site without components.

    Args:
        revived: The variant to put back when the site gets components again; None is plain LoRA.
    """

    def __init__(self, revived: LoraVariant | None) -> None:
        self.revived = revived

    @staticmethod
    def forward(
        module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        if active_adapter not in module.lora_magnitude_vector:
            return result
        scale = _factor(module, active_adapter)
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
        if active_adapter not in module.lora_magnitude_vector:
            return orig_weight.clone()
        factor = _merging_factor(module, active_adapter, safe_merge=True)
        # PEFT copied the weight before the other merged adapters were taken out and put back.
        weight = dequantize_module_weight(module.get_base_layer()).detach()
        return (weight * over_rows(module, factor)).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into ``orig_weight`` in place."""
        if active_adapter in module.lora_magnitude_vector:
            factor = _merging_factor(module, active_adapter, safe_merge=False)
            merged = orig_weight.data * over_rows(module, factor)
            orig_weight.data = merged.to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it was before the merge."""
        if active_adapter not in module.lora_magnitude_vector:
            return orig_weight
        factor = module._cache_pop(f"{active_adapter}-dead")
        return (orig_weight.data / over_rows(module, factor)).to(orig_weight.dtype)


def translate_state_dicts(layer: LoraLayer, adapter_name: str) -> None:
    """Register hooks that translate a dead site between the live model and a state dict.

    They do nothing while the site has components, and are registered once.
    """
    if not any(_is_translator(hook, adapter_name) for hook in layer._state_dict_hooks.values()):
        layer.register_state_dict_post_hook(partial(_on_save, adapter_name))
        layer.register_load_state_dict_pre_hook(partial(_on_load, adapter_name))


def _is_translator(hook: Any, adapter_name: str) -> bool:
    return isinstance(hook, partial) and hook.func is _on_save and hook.args == (adapter_name,)


def _on_save(
    adapter_name: str, module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Replace the empty tensors of a dead site by what stock PEFT can load."""
    for key, parameter, rank_axis in _empty_factors(module, adapter_name, prefix):
        if adapter_name in module.lora_magnitude_vector:
            shape = list(parameter.shape)
            shape[rank_axis] = 1
            state_dict[key] = parameter.detach().new_zeros(shape)
        else:
            state_dict.pop(key, None)


def _on_load(
    adapter_name: str, module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Give a dead site its empty tensors again, where the state dict holds ``_on_save``'s."""
    for key, parameter, _axis in _empty_factors(module, adapter_name, prefix):
        stored = state_dict.get(key)
        if stored is None or not torch.any(stored):
            state_dict[key] = parameter.detach().clone()


def _empty_factors(
    module: LoraLayer, adapter_name: str, prefix: str
) -> list[tuple[str, nn.Parameter, int]]:
    """Return key, parameter and rank axis of the factors that have no component."""
    if adapter_name in module.lora_embedding_A:
        paths = {f"lora_embedding_A.{adapter_name}": 0, f"lora_embedding_B.{adapter_name}": 1}
    elif adapter_name in module.lora_A:
        paths = {f"lora_A.{adapter_name}.weight": 0, f"lora_B.{adapter_name}.weight": 1}
    else:  # the adapter was deleted
        paths = {}
    factors = [(prefix + path, module.get_parameter(path), axis) for path, axis in paths.items()]
    return [(key, p, axis) for key, p, axis in factors if p.shape[axis] == 0]


def _factor(module: LoraLayer, adapter_name: str, weight: Tensor | None = None) -> Tensor:
    """Return ``m / ||W||``, shape ``(out,)``."""
    magnitude = module.lora_magnitude_vector[adapter_name].weight
    return magnitude_factor(magnitude, row_norms(module, weight))


def _merging_factor(module: LoraLayer, adapter_name: str, *, safe_merge: bool) -> Tensor:
    """Return the factor on the weight without other merged adapters, and keep it for unmerging."""
    with module._unmerged_base_weight(safe_merge=safe_merge) as weight:
        factor = _factor(module, adapter_name, weight).detach()
    module._cache_store(f"{adapter_name}-dead", factor)
    return factor
