r"""Where the components of a site are, under an engine whose tensors keep their shapes.

Under FSDP2 a parameter is a ``DTensor``, split over the processes along its first axis, and a new
shape is undone without a word. There A and B keep room for as many components as ``LoraConfig.r``
says: each is a slot, row i of A and column i of B, and a slot without a component is zero. Its
gradients are then zero too,

.. math:: \frac{\partial L}{\partial a_i} = s\, b_i^\top G, \qquad
    \frac{\partial L}{\partial b_i} = s\, G a_i,

so an optimizer that moves nothing whose gradient, moments and value are zero leaves it as it is.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this process holds, detached, in the same memory."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


class Slots:
    """The slots of one site, and which of them hold its components.

    Args:
        A: Right factor, split along its first axis, which runs over the slots.
        B: Left factor, split along its first axis, which runs over the outputs.

    Attributes:
        A: As given: a layer shows the sharded parameter only while it does not compute.
        B: As given.
        live: The slot of each component, in the order of the components.
        row_factor: DoRA's factor of each output row at the event under way, shape ``(out,)``.
    """

    def __init__(self, A: nn.Parameter, B: nn.Parameter) -> None:
        self.A, self.B = A, B
        self.live = list(range(A.shape[0]))
        self.row_factor: Tensor | None = None
        self.here = _part(A)
        self.outputs_here = _part(B)

    @property
    def capacity(self) -> int:
        """Slots, live or not."""
        return self.A.shape[0]

    def pieces(self, axis: int, first: int, count: int) -> list[tuple[int, int]]:
        """Return where consecutive components lie in the local part of a factor.

        Args:
            axis: 0 for A and 1 for B.
            first: The first component.
            count: Number of components.

        Returns:
            For each that is in this process, its index along the axis, and 1.
        """
        slots = self.live[first : first + count]
        if axis == 1:  # every process holds some entries of each column
            return [(slot, 1) for slot in slots]
        return [(slot - self.here.start, 1) for slot in slots if slot in self.here]

    @torch.no_grad()
    def clear(self, slots: Sequence[int], tensors: Sequence[tuple[Tensor, int]]) -> None:
        """Set slots to zero, in tensors given with the axis that runs over the slots."""
        here = [slot - self.here.start for slot in slots if slot in self.here]
        for tensor, axis in tensors:
            part = local(tensor)
            index = torch.tensor(here if axis == 0 else list(slots), device=part.device)
            part.index_fill_(axis, index.long(), 0)


def _part(parameter: Tensor) -> range:
    """Return which entries along the first axis this process holds, as ``torch.chunk`` splits."""
    if not isinstance(parameter, DTensor):
        return range(parameter.shape[0])
    size = parameter.shape[0]
    mesh = parameter.device_mesh
    each = -(-size // mesh.size())
    first = min(mesh.get_local_rank() * each, size)
    part = range(first, min(first + each, size))
    assert len(part) == len(local(parameter)), "FSDP splits otherwise"
    return part
