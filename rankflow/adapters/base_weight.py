"""The frozen weight under an adapter, seen in the same orientation for every kind of layer."""

import copy
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import (
    dequantize_bnb_weight,
    dequantize_module_weight,
    get_bnb_param_type,
)
from torch import Tensor, nn


def output_axis(layer: LoraLayer) -> int:
    """Axis of the base weight that runs over output features.

    Embeddings and transformers' ``Conv1D`` store ``(in, out)``; all others ``(out, in, ...)``.
    """
    is_embedding = isinstance(layer.get_base_layer(), nn.Embedding)
    return 1 if is_embedding or getattr(layer, "fan_in_fan_out", False) else 0


def dense_weight(layer: LoraLayer) -> Tensor:
    """Return the frozen weight in its own layout, dequantised where it is quantised.

    Args:
        layer: The adapted layer.
    """
    base = layer.get_base_layer()
    if get_bnb_param_type(base.weight):
        # PEFT's helper for modules puts the weight back without its int8 statistics.
        return dequantize_bnb_weight(_unpacked(base.weight), state=getattr(base, "state", None))
    return base.weight if base.weight.is_floating_point() else dequantize_module_weight(base)


def _unpacked(weight: Any) -> Any:
    """Return a 4-bit weight in the order of its rows, which its dequantisation takes for granted.

    On some CPUs bitsandbytes reorders it at the first forward in evaluation mode.
    """
    state: Any = getattr(weight, "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return weight
    from bitsandbytes import functional as bnb  # optional package

    # Unpacking writes into the state, and the layer still needs the one it has.
    data, state = bnb._convert_weight_packed_for_cpu_inverse(weight.data, copy.copy(state))
    return type(weight)(data, requires_grad=False, quant_state=state, bnb_quantized=True)


def base_rows(layer: LoraLayer) -> Tensor:
    """Return the frozen weight as ``(out_features, in_features)``, dequantised.

    Args:
        layer: The adapted layer.
    """
    weight = dense_weight(layer).detach()
    return weight.movedim(output_axis(layer), 0).flatten(1)


def row_norms(layer: LoraLayer, weight: Tensor | None = None) -> Tensor:
    r"""Euclidean norm of each output row, :math:`n_j = \lVert W_j \rVert`.

    Args:
        layer: The adapted layer.
        weight: Its weight, or None for the base layer's own (dequantised where it is quantised).

    Returns:
        Norms of shape ``(out_features,)``, at least float32, never zero, so that a row of zeros
        with a magnitude of zero gives 0 and not NaN.
    """
    if weight is None:
        weight = dense_weight(layer)
    rows = weight.detach().movedim(output_axis(layer), 0).flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return torch.linalg.vector_norm(rows, dim=1).clamp_min(torch.finfo(rows.dtype).tiny)


def magnitude_factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    r"""DoRA's factor of each output row, :math:`c_j = m_j / n_j`.

    Args:
        magnitude: m, ``out`` entries in any shape.
        norms: n, shape ``(out,)``.

    Returns:
        c in the norms' precision, shape ``(out,)``; 1 for a row of zeros, which has no direction.
    """
    return torch.where(is_zero_row(norms), 1, magnitude.flatten().to(norms.dtype) / norms)


def is_zero_row(norms: Tensor) -> Tensor:
    """Tell which rows are zero, from norms that are kept from being exactly 0."""
    return norms <= torch.finfo(norms.dtype).tiny


def over_rows(layer: LoraLayer, vector: Tensor) -> Tensor:
    """Shape a vector over output features so that it broadcasts against the base weight."""
    shape = [1] * layer.get_base_layer().weight.ndim
    shape[output_axis(layer)] = -1
    return vector.view(shape)


def count_base_parameters(model: PeftModel) -> int:
    """Count the parameters of the base model, without adapters and trained heads."""
    return sum(
        # A 4-bit weight packs two parameters into one element.
        parameter.numel() * (2 if type(parameter).__name__ == "Params4bit" else 1)
        for name, parameter in model.get_base_model().named_parameters()
        if ".lora_" not in name and ".modules_to_save." not in name
    )
