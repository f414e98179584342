r"""Gated components: each has a trainable factor of its own, as in Dynamic-Rank DoRA.

.. math:: \Delta W = s\, B\, \mathrm{diag}(c)\, A

(arXiv 2405.17357). The gate c is a parameter of PEFT's own layer, ``lora_gate``, which PEFT trains,
moves, activates and deletes like its other adapter parameters. Everything that computes with the
left factor reads ``effective_B``, in which the gate is folded. Stock PEFT knows no gate, so every
state dict holds the folded B in its place.

A state dict that holds exactly what the live B and c make together leaves both alone when it is
loaded; any other one is taken over with c = 1. Since B cannot be told from B c where c is 0, a run
that goes on must first bring B and c back from ``RankFlow.state_dict``.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional

_GATES = "lora_gate"
_ROW_GATES = "lora_row_gate"


def add_gate(layer: LoraLayer, adapter_name: str) -> None:
    """Put a gate of 1 on every component of a layer's adapter, which changes no output.

    Args:
        layer: The adapted layer; its forward must become that of ``GatedVariant``.
        adapter_name: The adapter.
    """
    if find_gate(layer, adapter_name) is not None:
        return
    if _GATES not in layer.adapter_layer_names:
        layer.lora_gate = nn.ParameterDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, _GATES)
    B = _stored_B(layer, adapter_name)
    layer.lora_gate[adapter_name] = nn.Parameter(B.new_ones(B.shape[1]), B.requires_grad)
    layer.register_state_dict_post_hook(partial(_on_save, adapter_name))
    layer.register_load_state_dict_pre_hook(partial(_on_load, adapter_name))


def add_row_gate(layer: LoraLayer, adapter_name: str) -> None:
    """Put a factor of 1 on every output row of a gated adapter, which changes no output.

    Args:
        layer: The adapted layer.
        adapter_name: The adapter; its components have gates.
    """
    if find_row_gate(layer, adapter_name) is not None:
        return
    if _ROW_GATES not in layer.adapter_layer_names:
        layer.lora_row_gate = nn.ParameterDict()
        layer.adapter_layer_names = (*layer.adapter_layer_names, _ROW_GATES)
    gate = layer.lora_gate[adapter_name]
    rows = gate.new_ones(len(_stored_B(layer, adapter_name)))
    layer.lora_row_gate[adapter_name] = nn.Parameter(rows, gate.requires_grad)


def find_row_gate(layer: LoraLayer, adapter_name: str) -> nn.Parameter | None:
    """Return the factor b of each output row, shape ``(out,)``, or None if there is none."""
    gates = getattr(layer, _ROW_GATES, None)
    return None if gates is None or adapter_name not in gates else gates[adapter_name]


def find_gate(layer: LoraLayer, adapter_name: str) -> nn.Parameter | None:
    """Return the gate c of a layer's adapter, shape ``(rank,)``, or None if it has none."""
    gates = getattr(layer, _GATES, None)
    return None if gates is None or adapter_name not in gates else gates[adapter_name]


def effective_B(layer: LoraLayer, adapter_name: str) -> Tensor:  # noqa: N802
    """Return the left factor as it acts, ``B diag(c)``, in the shape of B; B itself without a gate.

    With VeRA's factors on the rows it is ``diag(b) B diag(c)``. Gradients flow to all of them.
    """
    B, gate = _stored_B(layer, adapter_name), find_gate(layer, adapter_name)
    return B if gate is None else fold(B, gate, find_row_gate(layer, adapter_name))


def stored_factors(layer: LoraLayer, adapter_name: str) -> tuple[nn.Parameter, ...]:
    """Return all parameters that the update is made of: A, B, and gates of columns and rows if any.

    The rank is axis 0 of A, axis 1 of B and axis 0 of the gate.
    """
    gate = find_gate(layer, adapter_name)
    is_embedding = adapter_name in layer.lora_embedding_A
    A = layer.lora_embedding_A[adapter_name] if is_embedding else layer.lora_A[adapter_name].weight
    pair = (A, _stored_B(layer, adapter_name))
    if gate is None:
        return pair
    row_gate = find_row_gate(layer, adapter_name)
    return (*pair, gate) if row_gate is None else (*pair, gate, row_gate)


def fold(B: Tensor, gate: Tensor, row_gate: Tensor | None = None) -> Tensor:
    """Multiply each column of B by its gate, and each row by its own if there is one.

    Args:
        B: Shape ``(out, rank, ...)``.
        gate: Shape ``(rank,)``.
        row_gate: Shape ``(out,)``, or None.
    """
    columns = B * gate.view(-1, *[1] * (B.ndim - 2))
    return columns if row_gate is None else columns * row_gate.view(-1, *[1] * (B.ndim - 1))


class GatedVariant(LoraVariant):
    """The forward and the merging of a site whose components have gates.

    Args:
        inner: RankFlow's own DoRA variant, which reads ``effective_B``; None for plain LoRA.
    """

    def __init__(self, inner: LoraVariant | None) -> None:
        self.inner = inner

    def supports_lora_conversion(self) -> bool:
        """Return False: PEFT's converter reads B without the gate."""
        return False

    def forward(
        self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any
    ) -> Tensor:
        """Return the layer's output, given the base layer's output ``result``."""
        if self.inner is not None:
            return self.inner.forward(module, active_adapter, x, result, **kwargs)
        B = effective_B(module, active_adapter)
        scale = module.scaling[active_adapter]
        if active_adapter in module.lora_embedding_A:
            hidden = module._embed(x, module.lora_embedding_A[active_adapter].T)
            branch = functional.linear(hidden, B) * scale
            embed_scale = module._get_embed_scale()
            return result + (branch if embed_scale is None else branch * embed_scale.to(B.dtype))
        hidden = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        return result + apply_B(module, active_adapter, hidden, B) * scale

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the merged weight as a new tensor."""
        with _folded(module, active_adapter):
            if self.inner is not None:
                return self.inner.merge_safe(module, active_adapter, orig_weight)
            return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        """Merge into ``orig_weight`` in place."""
        with _folded(module, active_adapter):
            if self.inner is not None:
                self.inner.merge_unsafe(module, active_adapter, orig_weight)
            else:
                orig_weight.data += module.get_delta_weight(active_adapter)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        """Return the weight as it was before the merge."""
        with _folded(module, active_adapter):
            if self.inner is not None:
                return self.inner.unmerge(module, active_adapter, orig_weight)
            return orig_weight.data - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def apply_B(  # noqa: N802
    layer: LoraLayer, adapter_name: str, hidden: Tensor, B: Tensor
) -> Tensor:
    """Return what PEFT's module of B puts out, with another B in its place.

    Args:
        layer: The adapted linear layer or convolution.
        adapter_name: The adapter.
        hidden: Output of the module of A.
        B: Shape of the module's weight.
    """
    module = layer.lora_B[adapter_name]
    if isinstance(module, nn.modules.conv._ConvNd):
        return module._conv_forward(hidden, B, None)
    return functional.linear(hidden, B)


def _stored_B(layer: LoraLayer, adapter_name: str) -> nn.Parameter:  # noqa: N802
    if adapter_name in layer.lora_embedding_B:
        return layer.lora_embedding_B[adapter_name]
    return layer.lora_B[adapter_name].weight


@contextmanager
def _folded(layer: LoraLayer, adapter_name: str) -> Iterator[None]:
    """Let PEFT's merging, which reads B alone, see it with the gate folded in."""
    B = _stored_B(layer, adapter_name)
    stored = B.data
    B.data = effective_B(layer, adapter_name).detach()
    try:
        yield
    finally:
        B.data = stored


def _keys(layer: LoraLayer, adapter_name: str, prefix: str) -> tuple[str, str, str]:
    """Return the keys of B and of both gates in a state dict."""
    is_embedding = adapter_name in layer.lora_embedding_B
    B = f"lora_embedding_B.{adapter_name}" if is_embedding else f"lora_B.{adapter_name}.weight"
    gate, row_gate = (f"{prefix}{kind}.{adapter_name}" for kind in (_GATES, _ROW_GATES))
    return prefix + B, gate, row_gate


@torch.no_grad()
def _on_save(
    adapter_name: str, module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Put the folded B into a state dict, and take the gate out."""
    B_key, gate_key, row_key = _keys(module, adapter_name, prefix)
    gate, row_gate = state_dict.pop(gate_key, None), state_dict.pop(row_key, None)
    # A dead site has no B here, or one with a component of zeros.
    if gate is not None and B_key in state_dict and state_dict[B_key].shape[1] == len(gate):
        state_dict[B_key] = fold(state_dict[B_key], gate, row_gate)


@torch.no_grad()
def _on_load(
    adapter_name: str, module: LoraLayer, state_dict: dict[str, Tensor], prefix: str, *_: Any
) -> None:
    """Split the folded B of a state dict into a B and a gate again."""
    gate, row_gate = find_gate(module, adapter_name), find_row_gate(module, adapter_name)
    B_key, gate_key, row_key = _keys(module, adapter_name, prefix)
    if gate is None or gate_key in state_dict or (B_key not in state_dict and len(gate) > 0):
        return
    B = _stored_B(module, adapter_name)
    live = fold(B, gate, row_gate)
    is_same = len(gate) == 0 or torch.equal(state_dict[B_key].to(B.device), live)
    if is_same and len(gate) > 0:
        state_dict[B_key] = B.detach().clone()
    state_dict[gate_key] = gate.detach().clone() if is_same else torch.ones_like(gate)
    if row_gate is not None:
        state_dict[row_key] = row_gate.detach().clone() if is_same else torch.ones_like(row_gate)
