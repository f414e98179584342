"""BitFit: only biases train (Ben Zaken et al. 2022, arXiv 2106.10199).

Models such as Llama have no biases. There each linear layer gets one that starts at zero, as in
LLaMA-Adapter V2 (Gao et al. 2023, arXiv 2304.15010).
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from rankflow.ablation.methods.method import Built, Setting, UnsupportedError
from rankflow.ablation.methods.preparing import freeze, hold_in_float32, lies_in
from rankflow.training.models import BaseModel


@dataclass(frozen=True, slots=True)
class BitFit:
    """Trains biases, those of the normalisations included, and no other weight.

    Its size counts layers whose bias trains, from the output down: where the budget does not hold
    all biases, those nearest the input stay as they are. For the fields see ``Method``.
    """

    summary: str = (
        "BitFit: only biases train; a linear layer without one gets one that starts at zero"
    )
    source: str = "Ben Zaken et al. 2022, arXiv 2106.10199"
    rate: float = 6e-3
    scalings: tuple[float, ...] = (1.0,)
    quantised: bool = False
    size_name: str = "biases"

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return every number of layers whose bias may train.

        Raises:
            UnsupportedError: The model has neither biases nor linear layers.
        """
        return range(1, len(_layers(base)) + 1)

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Let the biases of the layers nearest the output train.

        Raises:
            UnsupportedError: The model has neither biases nor linear layers.
        """
        assert size is not None, "BitFit has sizes"
        model = base.model
        layers = _layers(base)[-size:]
        freeze(base)
        for layer in layers:
            if layer.bias is None:
                layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
            layer.bias.requires_grad_(True)
        finish = hold_in_float32(model)
        return Built(model, finish=finish, merge=lambda: deepcopy(model))


def _layers(base: BaseModel) -> list[Any]:
    """Return the layers that have a bias or can get one, from the input on.

    What trains in full anyway is left out, and so is a language model's head.
    """
    is_stock = isinstance(base.model, PreTrainedModel)  # others have no head of that name
    head = base.model.get_output_embeddings() if is_stock else None
    layers = [
        module
        for name, module in base.model.named_modules()
        if not lies_in(name, base.full_modules) and module is not head and _takes_bias(module)
    ]
    if not layers:
        raise UnsupportedError(
            f"bitfit trains biases, and {type(base.model).__name__} has neither a layer with a "
            "bias nor a linear layer that could get one"
        )
    return layers


def _takes_bias(module: nn.Module) -> bool:
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return isinstance(module, nn.Linear) or "bias" in own
