"""How a tensor comes back whose memory was freed: what is left of it, and what was taken away.

A tensor that was cut along one axis lives on in its successor, which has the entries that stayed
first, bit for bit, and newborns behind them. So only the entries that went are kept, in the memory
of the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class WayBack:
    """What a tensor held.

    Attributes:
        dtype: Its type.
        device: Where it was.
        shape: Its shape.
        stride: Its stride.
        axis: The axis along which it was cut.
        kept: Indices of the entries that stayed.
        removed: Indices of all others.
        rest: The removed entries, on the host; of any content if there are none.
        successor: What took its place: it begins with the kept entries, in their order. None where
            none was kept.
    """

    dtype: torch.dtype
    device: torch.device
    shape: torch.Size
    stride: tuple[int, ...]
    axis: int
    kept: Tensor
    removed: Tensor
    rest: Tensor
    successor: Tensor | None

    def rebuild(self) -> Tensor:
        """Return what the tensor held, in new memory."""
        old = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        if len(self.removed) > 0:
            old.index_copy_(self.axis, self.removed, self.rest.to(old.device))
        if self.successor is not None and len(self.kept) > 0:
            survivors = self.successor.detach().narrow(self.axis, 0, len(self.kept))
            old.index_copy_(self.axis, self.kept, survivors)
        return old


def after_cut(old: Tensor, successor: Tensor, axis: int, kept: Tensor, removed: Tensor) -> WayBack:
    """Return the way back from a successor that holds some of a tensor's entries.

    Args:
        old: The tensor.
        successor: What takes its place: its kept entries, and newborns behind them.
        axis: The axis along which it was cut.
        kept: Indices of the entries that stay, on the tensor's device.
        removed: Indices of all others, on the tensor's device.
    """
    rest = to_host(old.detach().index_select(axis, removed)) if len(removed) else removed
    return _way_back(old, axis, kept, removed, rest, successor)


def whole(old: Tensor) -> WayBack:
    """Return the way back to a tensor of which nothing stays.

    Args:
        old: The tensor, of at least one dimension.
    """
    everything = torch.arange(len(old), device=old.device)
    return _way_back(old, 0, everything[:0], everything, to_host(old.detach()), None)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor in the memory of the host; one that lies there is not copied."""
    return tensor.to("cpu")


def _way_back(
    old: Tensor, axis: int, kept: Tensor, removed: Tensor, rest: Tensor, successor: Tensor | None
) -> WayBack:
    like = (old.dtype, old.device, old.shape, old.stride())
    return WayBack(*like, axis, kept, removed, rest, successor)
