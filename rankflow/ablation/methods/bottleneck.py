r"""Bottleneck adapters (Houlsby et al. 2019, arXiv 1902.00751).

Each block gets two of them, on what attention and the feed-forward layer are about to add to the
residual stream,

.. math:: h \mapsto h + U\,\mathrm{gelu}(D h + d) + u,

of width m between D and U. U and u start at zero, so that the model starts as the base. Unlike in
the paper, normalisations stay frozen, as in the `adapters` library, and dropout comes before the
adapter.

The two places are told by name: the layers that write to the residual stream are called alike in
all the families of transformers, and a block where one of the two is not found is refused.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D

from rankflow.ablation.methods.method import Built, Setting, UnsupportedError
from rankflow.ablation.methods.preparing import freeze, lies_in
from rankflow.training.models import BaseModel

_BLOCK = re.compile(r"(.*?\.\d+)\.(.*)")  # a block's path and the path inside it
_ATTENTION = re.compile(r".*att.*\.(o|o_proj|out_proj|out_lin|c_proj|dense|proj|wo)", re.IGNORECASE)
_FEED_FORWARD = re.compile(
    r"(?!.*(att|expert))(.*\.)?"
    r"(down_proj|c_proj|fc2|fc_out|lin2|w2|wo|dense_4h_to_h|ffn_output|output\.dense)",
    re.IGNORECASE,
)


class Bottleneck(nn.Module):
    """One adapter, which starts as the identity.

    Args:
        width: Features of the residual stream.
        size: Features of the bottleneck.
        device: Where it lives.
    """

    def __init__(self, width: int, size: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, device=device)
        self.up = nn.Linear(size, width, device=device)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return what goes on to the residual sum, in the shape and type of ``hidden``."""
        change = self.up(functional.gelu(self.down(hidden.to(self.down.weight.dtype))))
        return hidden + change.to(hidden.dtype)


@dataclass(frozen=True, slots=True)
class BottleneckAdapters:
    """Trains two bottlenecks in each block. For the fields see ``Method``."""

    summary: str = (
        "bottleneck adapters after attention and feed-forward (Houlsby), normalisations frozen"
    )
    source: str = "Houlsby et al. 2019, arXiv 1902.00751"
    rate: float = 8e-3
    scalings: tuple[float, ...] = (1.0,)
    quantised: bool = False
    size_name: str = "bottleneck"

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return every width below that of the residual stream.

        Raises:
            UnsupportedError: The places of the adapters are not found.
        """
        return range(1, min(_width(layer) for layer in _find_writers(base)))

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Put the bottlenecks in.

        Raises:
            UnsupportedError: The places of the adapters are not found.
        """
        assert size is not None, "bottlenecks have a size"
        writers = _find_writers(base)
        freeze(base)
        for layer in writers:
            # A hook and no wrapper: some models look at the type or the weight of their layers.
            layer.adapter = Bottleneck(_width(layer), size, layer.weight.device)
            layer.register_forward_hook(_adapt)
        return Built(base.model)


def _adapt(layer: Any, inputs: tuple[Tensor], output: Tensor) -> Tensor:
    return layer.adapter(output)


def _is_linear(module: nn.Module) -> bool:
    # Torch's own attention does not call its output projection, so that no hook would run.
    is_bypassed = isinstance(module, NonDynamicallyQuantizableLinear)
    return isinstance(module, nn.Linear | Conv1D) and not is_bypassed


def _width(layer: Any) -> int:
    return layer.nf if isinstance(layer, Conv1D) else layer.weight.shape[0]


def _find_writers(base: BaseModel) -> list[Any]:
    """Find the layers of all blocks that write to the residual stream."""
    blocks: dict[str, dict[str, Any]] = defaultdict(dict)
    for name, module in base.model.named_modules():
        place = _BLOCK.fullmatch(name)
        if place and _is_linear(module) and not lies_in(name, base.full_modules):
            blocks[place[1]][place[2]] = module
    if not blocks:
        raise UnsupportedError(
            f"the bottleneck adapter needs a stack of blocks with linear layers, and "
            f"{type(base.model).__name__} has none"
        )
    return [layer for block, layers in blocks.items() for layer in _writers_of(block, layers)]


def _writers_of(block: str, layers: dict[str, Any]) -> list[Any]:
    writers: list[Any] = []
    for what, pattern in (("attention", _ATTENTION), ("feed-forward", _FEED_FORWARD)):
        found = [layer for name, layer in layers.items() if pattern.fullmatch(name)]
        if not found:
            raise UnsupportedError(
                f"the bottleneck adapter comes after the output projection of {what}, and no "
                f"linear layer of block {block!r} is called like one: {', '.join(layers)}"
            )
        writers += found
    return writers
