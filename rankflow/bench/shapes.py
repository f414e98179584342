"""Decoder layers in the shapes of well-known models, with random weights."""

from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig


@dataclass(frozen=True, slots=True)
class Shape:
    """A stack of Llama's decoder layers.

    Args:
        name: The model that has this shape.
        hidden: Width of the residual stream.
        intermediate: Width of the feed-forward block.
        heads: Attention heads.
        kv_heads: Heads of keys and values.
        layers: Decoder layers of the whole model.
    """

    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    layers: int


LLAMA3_8B: Final = Shape("Llama-3-8B", 4096, 14336, 32, 8, 32)
LLAMA3_70B: Final = Shape("Llama-3-70B", 8192, 28672, 64, 8, 80)
LLAMA3_405B: Final = Shape("Llama-3-405B", 16384, 53248, 128, 8, 126)
SMALL: Final = Shape("small", 512, 1408, 8, 8, 32)
TINY: Final = Shape("tiny", 32, 48, 2, 1, 2)


class Decoder(nn.Module):
    """Decoder layers between given hidden states and a scalar, without embedding and head.

    Args:
        shape: The shape.
        layers: How many layers.
        device: Where they live; ``meta`` for none.
        dtype: Type of the weights.
    """

    def __init__(self, shape: Shape, layers: int, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=1,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=8192,
            use_cache=False,
        )
        with device:
            self.model = AutoModel.from_config(config, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return a loss, shape ``()``.

        Args:
            x: Hidden states, shape ``(1, tokens, hidden)``.
        """
        states: Tensor = self.model(inputs_embeds=x).last_hidden_state
        return states.abs().mean(
            dtype=torch.float32
        )  # their squares have mean 1, whatever they are


def quantise(decoder: Decoder) -> Decoder:
    """Put the weights of a decoder's linear layers into nf4, in place.

    Args:
        decoder: A decoder on the device where it is to run.
    """
    import bitsandbytes as bnb  # optional package

    for layer in decoder.model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, _four_bits(bnb, child))
    vars(decoder)["is_loaded_in_4bit"] = True  # what PEFT asks for
    return decoder


def _four_bits(bnb: Any, linear: nn.Linear) -> nn.Module:
    weight = linear.weight
    quantised = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    quantised.weight = bnb.nn.Params4bit(weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return quantised.to(weight.device)
