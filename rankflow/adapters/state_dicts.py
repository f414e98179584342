"""What a site that lacks something becomes in a state dict, so that stock PEFT can load it.

A live site of rank 0 has empty factors, and a DoRA site whose magnitude is off has an empty one and
computes as LoRA. Stock PEFT saves empty tensors and cannot load them. In a state dict therefore

* a dead site without a magnitude is absent;
* a dead site with a magnitude has one component of zeros;
* a magnitude that is off is the norm ``||W + s B A||``, which DoRA divides by.

Each is the same function.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from rankflow.adapters.dead import has_magnitude
from rankflow.adapters.gate import effective_B
from rankflow.adapters.magnitude import neutral_magnitude


def translate_state_dicts(layer: LoraLayer, adapter_name: str) -> None:
    """Register hooks that translate empty tensors between the live model and a state dict.

    They do nothing while the site has components and its magnitude, and are registered once.
    """
    if not any(_is_translator(hook, adapter_name) for hook in layer._state_dict_hooks.values()):
        layer.register_state_dict_post_hook(partial(_on_save, adapter_name))
        layer.register_load_state_dict_pre_hook(partial(_on_load, adapter_name))


def _is_translator(hook: Any, adapter_name: str) -> bool:
    return isinstance(hook, partial) and hook.func is _on_save and hook.args == (adapter_name,)


def _on_save(
    adapter_name: str, module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Replace the empty tensors of a site by what stock PEFT can load."""
    factors = _factors(module, adapter_name, prefix)
    is_dead = any(_is_empty(factor) for factor in factors)
    if _is_turned_off(module, adapter_name):
        key = _magnitude_key(adapter_name, prefix)
        if is_dead or not module.use_dora[adapter_name]:
            del state_dict[key]
        else:
            A, B = factors[0].parameter.detach(), effective_B(module, adapter_name).detach()
            state_dict[key] = neutral_magnitude(module, adapter_name, A, B)
    for factor in filter(_is_empty, factors):
        if has_magnitude(module, adapter_name):
            shape = list(factor.parameter.shape)
            shape[factor.rank_axis] = 1
            state_dict[factor.key] = factor.parameter.detach().new_zeros(shape)
        else:
            del state_dict[factor.key]


def _on_load(
    adapter_name: str, module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Give a site its empty tensors again, where the state dict holds ``_on_save``'s."""
    for factor in filter(_is_empty, _factors(module, adapter_name, prefix)):
        stored = state_dict.get(factor.key)
        if stored is None or not torch.any(stored):
            state_dict[factor.key] = factor.parameter.detach().clone()
    if _is_turned_off(module, adapter_name):
        slot = module.lora_magnitude_vector[adapter_name].weight
        state_dict[_magnitude_key(adapter_name, prefix)] = slot.detach().clone()


class _Factor(NamedTuple):
    key: str
    parameter: nn.Parameter
    rank_axis: int


def _factors(module: LoraLayer, adapter_name: str, prefix: str) -> list[_Factor]:
    """Return the factors A and B; none if the adapter was deleted."""
    if adapter_name in module.lora_embedding_A:
        paths = [f"lora_embedding_A.{adapter_name}", f"lora_embedding_B.{adapter_name}"]
    elif adapter_name in module.lora_A:
        paths = [f"lora_A.{adapter_name}.weight", f"lora_B.{adapter_name}.weight"]
    else:
        paths = []
    return [
        _Factor(prefix + path, module.get_parameter(path), axis) for axis, path in enumerate(paths)
    ]


def _is_empty(factor: _Factor) -> bool:
    return factor.parameter.shape[factor.rank_axis] == 0


def _magnitude_key(adapter_name: str, prefix: str) -> str:
    return f"{prefix}lora_magnitude_vector.{adapter_name}.weight"


def _is_turned_off(module: LoraLayer, adapter_name: str) -> bool:
    is_dora = adapter_name in module.lora_magnitude_vector
    return is_dora and not has_magnitude(module, adapter_name)
