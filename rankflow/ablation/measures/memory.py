"""How much memory a training step of the adapted model takes."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import Trainer

from rankflow.bench.memory import peak_bytes


def measure_step_memory(trainer: Trainer, batch: Mapping[str, Tensor]) -> int:
    """Return the most bytes that the tensors of a forward and backward pass hold at a time.

    Activations and gradients are counted, weights and the optimizer's state are not. Model,
    gradients and random numbers come out as they were.

    Args:
        trainer: Its model, loss and precision count.
        batch: A batch on the model's device.
    """
    model = trainer.model
    device = next(model.parameters()).device

    def compute() -> None:
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(model, dict(batch))
        loss.backward()

    with _untouched(model, device):
        return peak_bytes(compute, device)


@contextmanager
def _untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]  # e.g. running statistics
    modes = {module: module.training for module in model.modules()}
    for parameter in parameters:  # or the pass would add to them, in no memory of its own
        parameter.grad = None
    model.train()
    try:
        with torch.random.fork_rng([] if device.type == "cpu" else [device]):
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for buffer, value in buffers:
            buffer.copy_(value)
