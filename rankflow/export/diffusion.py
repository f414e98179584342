"""What diffusion models take, drawn with a seed from their configuration.

No import of diffusers is needed: a model of it cannot be there before the library is.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

_BATCH: Final = 2
_TOKENS: Final = 5  # of the condition
_SIDE: Final = 16  # of a latent picture, at most


def is_diffusers_model(model: nn.Module) -> bool:
    """Whether a model is one of the diffusers library."""
    library = sys.modules.get("diffusers")
    return library is not None and isinstance(model, library.ModelMixin)


def draw_diffusion_inputs(model: nn.Module, seed: int) -> dict[str, Any] | None:
    """Draw inputs for a denoising model: UNets, and transformers such as DiT, SD3 and Flux.

    Args:
        model: A model of diffusers.
        seed: Of the draw.

    Returns:
        Keyword arguments of its forward, in its own type; None if its configuration does not tell.
    """
    config: Mapping[str, Any] = dict(model.config)  # type: ignore[arg-type]
    taken = inspect.signature(model.forward).parameters
    draw = _Draw(model, seed)
    try:
        if "sample" in taken:
            return _for_unet(config, draw)
        made = _for_transformer(config, draw, is_sequence="img_ids" in taken)
    except (KeyError, TypeError):  # a key is missing, or holds no number
        return None
    return {name: value for name, value in made.items() if name in taken}


class _Draw:
    """Draws tensors of a model's type."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        self._generator = torch.Generator().manual_seed(seed)

    def numbers(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self._dtype)

    def classes(self, count: int) -> Tensor:
        return torch.randint(count, (_BATCH,), generator=self._generator)


def _for_unet(config: Mapping[str, Any], draw: _Draw) -> dict[str, Any]:
    halvings = len(config["block_out_channels"]) - 1
    side = max(min(config["sample_size"] or _SIDE, _SIDE), 2**halvings)
    made: dict[str, Any] = {
        "sample": draw.numbers(_BATCH, config["in_channels"], side, side),
        "timestep": _timesteps(),
        "encoder_hidden_states": draw.numbers(_BATCH, _TOKENS, config["cross_attention_dim"]),
    }
    if config["num_class_embeds"] is not None:
        made["class_labels"] = draw.classes(config["num_class_embeds"])
    if config["addition_embed_type"] == "text_time":  # SDXL
        ids = 6
        embedded = ids * config["addition_time_embed_dim"]
        width = config["projection_class_embeddings_input_dim"] - embedded
        made["added_cond_kwargs"] = {
            "text_embeds": draw.numbers(_BATCH, width),
            "time_ids": draw.numbers(_BATCH, ids),
        }
    return made


def _for_transformer(
    config: Mapping[str, Any], draw: _Draw, *, is_sequence: bool
) -> dict[str, Any]:
    channels = config["in_channels"]
    side = min(config.get("sample_size") or _SIDE, _SIDE)
    picture = (side * side, channels) if is_sequence else (channels, side, side)
    made = {"hidden_states": draw.numbers(_BATCH, *picture), "timestep": _timesteps()}
    for key in ("joint_attention_dim", "cross_attention_dim"):
        if config.get(key) is not None:
            made["encoder_hidden_states"] = draw.numbers(_BATCH, _TOKENS, config[key])
            break
    if config.get("pooled_projection_dim") is not None:
        made["pooled_projections"] = draw.numbers(_BATCH, config["pooled_projection_dim"])
    if config.get("num_embeds_ada_norm") is not None:
        made["class_labels"] = draw.classes(config["num_embeds_ada_norm"])
    if config.get("guidance_embeds"):
        made["guidance"] = draw.numbers(_BATCH)
    if is_sequence:
        axes = len(config["axes_dims_rope"])
        made["img_ids"] = draw.numbers(side * side, axes)
        made["txt_ids"] = draw.numbers(_TOKENS, axes)
    return made


def _timesteps() -> Tensor:
    return torch.arange(1, _BATCH + 1)
