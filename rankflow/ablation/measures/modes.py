"""Look at a model without leaving a trace in it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode and without gradients; each module gets its mode back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def without_trainer_precision(model: nn.Module) -> Iterator[None]:
    """Take off what a Trainer in mixed precision leaves on the model's forward.

    accelerate replaces the forward by one under autocast that turns outputs to float32, and leaves
    it there. Its own ``extract_model_from_parallel`` takes off the decorators of transformers too,
    after which the model cannot be called.
    """
    if "_original_forward" not in vars(model):
        yield
        return
    wrapped = model.forward
    model.forward = vars(model)["_original_forward"]
    try:
        yield
    finally:
        model.forward = wrapped
