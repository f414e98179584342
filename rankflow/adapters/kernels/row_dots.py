r"""Dot products of the rows of many tensors with the rows of their gradients, in one launch.

.. math:: T_i = \langle w_i, \partial L / \partial w_i \rangle \quad \text{or} \quad
    \langle w_i - n_i, \partial L / \partial w_i \rangle

An adapter has hundreds of tensors of a few rows each. They stay where they are: a table of
addresses tells every program its row, while the torch code joins weights, and gradients, end to end
first, and so moves all of them three times instead of once.

*Order.* A row is one program's, which adds up its blocks one after the other, in float32: the sums
are the same at every call.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from rankflow.adapters.kernels.addresses import TYPES, Addresses
from rankflow.adapters.kernels.launch import on_device, power_of_two

_BLOCK = 4096


class RowTable:
    """The rows of tensors whose shapes stay: make a new one after every resize.

    Args:
        rows: Rows of each tensor.
        lengths: Entries of each tensor's rows, one after the other in memory.
        device: Where the tensors are.

    Attributes:
        device: As given.
    """

    def __init__(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        self.device = device
        self._count = sum(rows)
        self._block = power_of_two(max(lengths, default=0), 128, _BLOCK)
        table = [
            (owner, row, length)
            for owner, (count, length) in enumerate(zip(rows, lengths, strict=True))
            for row in range(count)
        ]
        self._rows = torch.tensor(table, dtype=torch.int64, device=device)  # (rows, 3)
        self._addresses = Addresses(device)

    def dots(
        self,
        addresses: list[int],
        dtype: torch.dtype,
        subtracted: torch.dtype | None = None,
    ) -> Tensor:
        """Return one dot product a row, float32, shape ``(rows,)``, without waiting.

        Args:
            addresses: Of all tensors, then of all gradients, 0 where there is none, which counts as
                zeros; and then, of what is subtracted from the tensors. There, a row that is not
                above the least normal number belongs to no direction, and nothing moves it.
            dtype: Of tensors and gradients.
            subtracted: Type of what is subtracted, None if nothing is.
        """
        dots = torch.empty(self._count, device=self.device)
        if self._count == 0:
            return dots
        tensors = len(addresses) // (2 if subtracted is None else 3)
        with on_device(dots):
            _dot_rows[(self._count,)](
                *(self._rows, self._addresses.bring(addresses), dots, tensors),
                TYPE=TYPES[dtype],
                SUBTRACTED=TYPES[subtracted or torch.float32],
                SUBTRACTS=subtracted is not None,
                TINY=torch.finfo(subtracted or torch.float32).tiny,
                BLOCK=self._block,
                num_warps=4,
            )
        return dots


@triton.jit(do_not_specialize=["tensors"])
def _dot_rows(
    rows: tl.tensor,
    addresses: tl.tensor,
    dots: tl.tensor,
    tensors: tl.tensor,
    TYPE: tl.constexpr,
    SUBTRACTED: tl.constexpr,
    SUBTRACTS: tl.constexpr,
    TINY: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    owner = tl.load(rows + 3 * program)
    length = tl.load(rows + 3 * program + 2)
    start = tl.load(rows + 3 * program + 1) * length
    weights = tl.load(addresses + owner).to(tl.pointer_type(TYPE)) + start
    gradient = tl.load(addresses + tensors + owner)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    if gradient != 0:
        gradients = gradient.to(tl.pointer_type(TYPE)) + start
        for first in range(0, length, BLOCK):
            entries = first + tl.arange(0, BLOCK)
            is_there = entries < length
            weight = tl.load(weights + entries, mask=is_there, other=0.0).to(tl.float32)
            if SUBTRACTS:
                norms = tl.load(addresses + 2 * tensors + owner).to(tl.pointer_type(SUBTRACTED))
                norm = tl.load(norms + start + entries, mask=is_there, other=0.0).to(tl.float32)
                weight = tl.where(norm > TINY, weight - norm, 0.0)
            slope = tl.load(gradients + entries, mask=is_there, other=0.0).to(tl.float32)
            total += weight * slope
    tl.store(dots + program, tl.sum(total, axis=0))
