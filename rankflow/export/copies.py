"""Copies of a live model's base that leave the live model alone.

A layer under an adapter is copied without it. Frozen parameters are not copied: the new modules
hold the live tensors, so that a copy of a large model costs next to nothing.
"""

import copy
from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn


def evaluate(model: nn.Module) -> nn.Module:
    """Put a model into evaluation mode, all but its 4-bit layers, which have no other in effect.

    On some CPUs bitsandbytes reorders and rounds a 4-bit weight at the first forward in evaluation
    mode: that would change the live model, and PEFT's DoRA misreads such a weight.
    """
    model.eval()
    for module in model.modules():
        if type(getattr(module, "weight", None)).__name__ == "Params4bit":
            module.training = True
    return model


def copy_base(model: PeftModel) -> nn.Module:
    """Return the base model as it was before any adapter, in evaluation mode.

    Its trained heads are back at their start. None of its tensors may be written to.
    """
    memo = _shared(model)
    for module in _children_first(model):
        if isinstance(module, BaseTunerLayer):
            memo[id(module)] = copy.deepcopy(module.get_base_layer(), memo)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
    return _finish(copy.deepcopy(model.get_base_model(), memo))


def copy_merged(model: PeftModel, adapter_name: str, weights: Mapping[int, Tensor]) -> nn.Module:
    """Return the base model with other weights under its sites, in evaluation mode.

    Args:
        model: The live model.
        adapter_name: The adapter whose trained heads it gets.
        weights: New weight of each adapted layer, by the layer's ``id``.

    Returns:
        A stock model. Tensors other than ``weights`` may not be written to.
    """
    memo = _shared(model)
    for module in _children_first(model):
        if isinstance(module, BaseTunerLayer):
            layer = copy.deepcopy(module.get_base_layer(), memo)
            if id(module) in weights:
                layer.weight = nn.Parameter(weights[id(module)], requires_grad=False)
            memo[id(module)] = layer
        elif isinstance(module, ModulesToSaveWrapper):
            heads: dict[str, nn.Module] = dict(module.modules_to_save.items())
            head = heads.get(adapter_name, module.original_module)
            memo[id(module)] = copy.deepcopy(head, memo)
        elif isinstance(module, AuxiliaryTrainingWrapper):
            memo[id(module)] = copy.deepcopy(module.original_module, memo)
    return _finish(copy.deepcopy(model.get_base_model(), memo))


def copy_in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a model whose floating-point parameters are of another type; buffers stay as they are.

    Tensors that have the type already are shared.
    """
    memo: dict[int, object] = {
        id(parameter): nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
        for parameter in model.parameters()
        if parameter.is_floating_point()
    }
    return copy.deepcopy(model, memo)


def _shared(model: PeftModel) -> dict[int, object]:
    frozen = (p for p in model.get_base_model().parameters() if not p.requires_grad)
    return {id(parameter): parameter for parameter in frozen}


def _children_first(model: PeftModel) -> list[nn.Module]:
    return list(model.get_base_model().modules())[::-1]


def _finish(base: nn.Module) -> nn.Module:
    if hasattr(base, "peft_config"):  # PEFT's mark of a model that is wrapped already
        del base.peft_config
    return evaluate(base)
