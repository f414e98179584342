"""Start a new task head where the frozen baseline ends.

A head drawn at random spends the first hundreds of steps on what a convex fit finds at once, and
sends noise into the adapter meanwhile. Started from the baseline's head, a run begins at the
baseline's metrics, and all that it gains is the adapter's: probe first, then fine-tune
(Kumar et al. 2022, arXiv 2202.10054).
"""

import torch
from torch import nn

from rankflow.training.baseline import LinearHead
from rankflow.training.models import BaseModel


def start_head(base: BaseModel, head: LinearHead) -> None:
    """Copy a fitted head into the model, if its new head is one linear layer of that shape.

    A head from the checkpoint, or of several layers, stays as it is.

    Args:
        base: A token classifier; its head reads the encoder's last hidden states.
        head: A head fitted on those states.
    """
    layers = [base.model.get_submodule(name) for name in base.new_modules]
    match layers:
        case [nn.Linear() as layer] if layer.weight.shape == head.weight.shape:
            with torch.no_grad():
                layer.weight.copy_(head.weight)
                if layer.bias is not None:
                    layer.bias.copy_(head.bias)
