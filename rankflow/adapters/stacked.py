"""Weights that no adapter on layers reaches: the stacked experts of a mixture-of-experts model.

transformers keeps the experts of a layer in one tensor, ``(experts, out, in)``, that belongs to no
linear layer. PEFT adapts such a tensor by ``target_parameters`` alone, and for some architectures
(not for others) adds them to ``target_modules="all-linear"`` by itself. Those adapters cannot be
resized, so that RankFlow refuses them; what nothing adapts it names.
"""

import warnings

from peft import PeftModel
from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

_SHOWN = 3


def warn_of_stacked_weights(model: PeftModel) -> None:
    """Name the stacked weights of a model, which its adapter leaves as they are.

    Args:
        model: The model, adapted on layers.
    """
    stacked = find_stacked_weights(model.get_base_model())
    if not stacked:
        return
    names = list(stacked)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    warnings.warn(
        f"{len(names)} stacked weights, {sum(stacked.values()):,} parameters, are not adapted: "
        f"{', '.join(names[:_SHOWN])}{more}; RankFlow adapts layers, and what these tensors "
        "hold, such as experts, stays frozen",
        stacklevel=3,
    )


def find_stacked_weights(base: nn.Module) -> dict[str, int]:
    """Return the parameters of every three-dimensional weight that is no convolution's, by name.

    What a layer computes its own weight from, as under a weight norm, is no stack either.

    Args:
        base: A base model, with adapters in it or without.
    """
    return {
        f"{module_name}.{name}" if module_name else name: parameter.numel()
        for module_name, module in base.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd | ParametrizationList)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and min(parameter.shape) > 1
    }
