"""How much memory a training step of the adapted model takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from rankflow.memory import peak_bytes


def measure_peak_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """Return the most bytes that the tensors of a forward and backward pass hold at a time.

    Activations and gradients are counted, weights and the optimizer's state are not. Model,
    gradients and random numbers come out as they were.

    Args:
        model: The model; it runs in training mode.
        loss: Runs the model on a batch that is on its device, and returns the loss.
    """
    device = next(model.parameters()).device
    with _untouched(model, device):
        return peak_bytes(lambda: loss().backward(), device)


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
