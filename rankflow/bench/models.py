"""Models with random weights in the shapes of well-known ones, and their inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from rankflow.bench.cases import Case

VOCABULARY = 1000


@dataclass(frozen=True)
class Workload:
    """A frozen model and what it computes.

    Args:
        model: The model.
        targets: PEFT's ``target_modules``.
        loss: Maps the model, adapted or not, to the loss of a batch.
    """

    model: nn.Module
    targets: str | list[str]
    loss: Callable[[nn.Module], Tensor]


def build(case: Case, device: torch.device) -> Workload:
    """Return the model of a case, the same at every call."""
    torch.manual_seed(0)
    make = {"llama": _llama, "minilm": _minilm, "nf4": _nf4_layer}[case.shape]
    return make(case, device)


def _llama(case: Case, device: torch.device) -> Workload:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32 if case.tiny else 1024,
        intermediate_size=48 if case.tiny else 2816,
        num_hidden_layers=1 if case.tiny else 4,
        num_attention_heads=2 if case.tiny else 16,
        num_key_value_heads=2 if case.tiny else 16,
        use_cache=False,
    )
    return _language_model(LlamaForCausalLM(config), (1, 8 if case.tiny else 512), case, device)


def _minilm(case: Case, device: torch.device) -> Workload:
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32 if case.tiny else 384,
        intermediate_size=48 if case.tiny else 1536,
        num_hidden_layers=1 if case.tiny else 6,
        num_attention_heads=2 if case.tiny else 12,
    )
    size = (2, 4) if case.tiny else (32, 32)
    return _language_model(BertForMaskedLM(config), size, case, device)


def _language_model(
    model: Any, size: tuple[int, int], case: Case, device: torch.device
) -> Workload:
    model.to(device=device, dtype=getattr(torch, case.dtype))
    tokens = torch.randint(VOCABULARY, size, device=device)
    return Workload(
        model, "all-linear", lambda adapted: adapted(input_ids=tokens, labels=tokens).loss
    )


class _OneLayer(nn.Module):
    """A model of one layer that is quantised to four bits."""

    is_loaded_in_4bit = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output."""
        return self.layer(x)


def _nf4_layer(case: Case, device: torch.device) -> Workload:
    import bitsandbytes as bnb

    inner, outer, tokens = (64, 128, 4) if case.tiny else (1024, 2816, 512)
    layer = bnb.nn.Linear4bit(
        inner, outer, bias=False, quant_type="nf4", compute_dtype=getattr(torch, case.dtype)
    )
    x = torch.randn(tokens, inner, device=device, requires_grad=True)
    model = _OneLayer(layer).to(device)
    return Workload(model, ["layer"], lambda adapted: adapted(x).square().mean())
