"""One adapter on one model, trained and run step by step."""

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from enum import Enum

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from rankflow.adapters.dora import accelerate_dora
from rankflow.bench.cases import Case
from rankflow.bench.clock import seconds
from rankflow.bench.models import build
from rankflow.memory import peak_bytes


class Method(Enum):
    """What is compared."""

    LORA = "LoRA"
    DORA = "DoRA"
    OURS = "ours"


class Contestant:
    """An adapted model with its optimizer.

    Args:
        case: What is measured.
        method: The adapter.
        device: Where it runs.
    """

    def __init__(self, case: Case, method: Method, device: torch.device) -> None:
        workload = build(case, device)
        self._loss = workload.loss
        self._case, self._device = case, device
        self.model = _adapt(workload.model, workload.targets, case, method)
        self._optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def time_step(self) -> float:
        """Train for a step; return its seconds."""
        self.model.train()
        return seconds(self._step, self._device)

    def time_inference(self) -> float:
        """Run the model once without gradients; return the seconds."""
        return time_inference(self.model, self._loss, self._case, self._device)

    def peak(self) -> int:
        """Train for a step; return the most bytes that its tensors hold at a time."""
        self.model.train()
        return peak_bytes(self._step, self._device)

    def _step(self) -> None:
        with _precision(self._case, self._device):
            loss = self._loss(self.model)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def time_inference(
    model: nn.Module, loss: Callable[[nn.Module], object], case: Case, device: torch.device
) -> float:
    """Run a model once without gradients; return the seconds."""
    model.eval()
    with torch.no_grad(), _precision(case, device):
        return seconds(lambda: loss(model), device)


def _adapt(model: nn.Module, targets: str | list[str], case: Case, method: Method) -> PeftModel:
    config = LoraConfig(
        r=case.rank,
        lora_alpha=case.rank,
        lora_dropout=case.dropout,
        target_modules=targets,
        use_dora=method is not Method.LORA,
    )
    with warnings.catch_warnings():  # transformers 5.23 renamed it, and PEFT uses the old name too
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        adapted = get_peft_model(model, config)
        if case.checkpointing:
            adapted.enable_input_require_grads()
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
    if method is Method.OURS:
        accelerate_dora(adapted)
    return adapted


def _precision(case: Case, device: torch.device) -> AbstractContextManager[None]:
    return torch.autocast(device.type, torch.bfloat16) if case.autocast else nullcontext()
