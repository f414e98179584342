r"""Adam's correction for young components, of all factors, in one launch.

For a component before its k-th step, at the t-th of its factor, with :math:`S_\beta(n) = 1 -
\beta^n` (see `rankflow.fairstart`):

.. math::
    \alpha = \frac{S_1(t)}{S_1(k)}, \quad \gamma = \frac{S_2(t)}{S_2(k)}, \qquad
    g \gets \alpha g, \quad
    m \gets \frac{\alpha}{\alpha'} m, \quad
    v \gets \frac{\gamma}{\gamma'} v + \frac{1 - \beta_2}{\beta_2} (\gamma - \alpha^2) g^2

where primes are of the step before, and 1 before the first. An adapter has hundreds of factors of a
few young components each, for which torch needs five small operations apiece.

*Reading.* A slice is ``(outer, inner)`` with a stride: components of A, or gates, lie in one
stretch, and those of B are a few entries of every row. The tensors stay where they are, and a
program takes one block of one slice.

*Step counts.* Optimizers that are fused or capturable count on the device, and the host does not
know how far. There the kernel reads the count, so it computes the factors itself, in float32.
:math:`1 - \beta^n` would lose digits at small n, but :math:`S(a + b) = S(a) + S(b) - S(a) S(b)`
loses none, and reaches n by its bits from :math:`S(1) = 1 - \beta`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from rankflow.adapters.kernels.addresses import TYPES, Addresses, upload
from rankflow.adapters.kernels.launch import on_device

_BLOCK = 1024


class YoungTable:
    """Where the young components of factors are: make a new one when that has changed.

    Args:
        slices: A slice in a row: the index of its factor, and there, in entries, the offset of its
            first entry, ``inner``, the stride of ``outer``, and its size, below ``2**31``.
        device: Where the factors are.

    Attributes:
        device: As given.
    """

    def __init__(
        self, slices: Sequence[tuple[int, int, int, int, int]], device: torch.device
    ) -> None:
        self.device = device
        table = torch.tensor(slices, dtype=torch.int64).reshape(-1, 5)
        blocks = (table[:, 4] + _BLOCK - 1) // _BLOCK
        owners = torch.repeat_interleave(blocks)  # of each block its slice
        within = torch.arange(len(owners)) - (blocks.cumsum(0) - blocks)[owners]
        self._programs = len(owners)
        self._slices = upload(table, device)
        self._blocks = upload(torch.stack((owners, within), 1), device)  # (programs, 2)
        self._addresses = Addresses(device)

    def correct(self, addresses: list[int], numbers: Sequence[float], dtype: torch.dtype) -> None:
        """Rescale gradients and moments in place, without waiting.

        Args:
            addresses: Five for each factor: its gradient (0 if it is to be left alone), first and
                second moment, the largest second moment, 0 if none is kept, and the steps taken,
                0 if they are among ``numbers``.
            numbers: Four for each slice: the steps that the optimizer has taken, ``1 - beta1``,
                ``1 - beta2``, and the steps that the components have lived.
            dtype: Of gradients and moments; the steps taken are float32.
        """
        if self._programs == 0:
            return
        given = upload(torch.tensor(numbers, dtype=torch.float32), self.device)
        with on_device(given):
            _correct[(self._programs,)](
                *(self._blocks, self._slices, self._addresses.bring(addresses), given),
                TYPE=TYPES[dtype],
                BLOCK=_BLOCK,
                num_warps=4,
            )


@triton.jit
def _correct(
    blocks: tl.tensor,
    slices: tl.tensor,
    addresses: tl.tensor,
    numbers: tl.tensor,
    TYPE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    program = tl.program_id(0).to(tl.int64)
    piece = tl.load(blocks + 2 * program)
    row = slices + 5 * piece
    factor = addresses + 5 * tl.load(row)
    gradient = tl.load(factor)
    if gradient != 0:
        inner, size = tl.load(row + 2).to(tl.int32), tl.load(row + 4).to(tl.int32)
        start = tl.load(blocks + 2 * program + 1).to(tl.int32) * BLOCK
        entries = start + tl.arange(0, BLOCK)
        there = entries < size
        places = tl.load(row + 1) + (entries // inner).to(tl.int64) * tl.load(row + 3)
        places += entries % inner
        gs = gradient.to(tl.pointer_type(TYPE)) + places
        ms = tl.load(factor + 1).to(tl.pointer_type(TYPE)) + places
        vs = tl.load(factor + 2).to(tl.pointer_type(TYPE)) + places
        g = tl.load(gs, there, 0.0).to(tl.float32)
        m = tl.load(ms, there, 0.0).to(tl.float32)
        v = tl.load(vs, there, 0.0).to(tl.float32)

        taken = tl.load(numbers + 4 * piece)
        counted = tl.load(factor + 4)
        if counted != 0:
            taken = tl.load(counted.to(tl.pointer_type(tl.float32)))
        rest1, rest2 = tl.load(numbers + 4 * piece + 1), tl.load(numbers + 4 * piece + 2)
        lived = tl.load(numbers + 4 * piece + 3)
        alpha, m_grows = _ratios(rest1, taken, lived)
        gamma, v_grows = _ratios(rest2, taken, lived)
        beta2 = 1.0 - rest2
        owed = rest2 / tl.where(beta2 > 0, beta2, 1.0) * (gamma - alpha * alpha)
        owed = tl.where(beta2 > 0, owed, 0.0)  # nothing of the last step is kept

        tl.store(gs, (alpha * g).to(TYPE), there)
        tl.store(ms, (m_grows * m).to(TYPE), there)
        tl.store(vs, (v_grows * v + owed * (g * g)).to(TYPE), there)
        largest = tl.load(factor + 3)
        if largest != 0:
            largest_vs = largest.to(tl.pointer_type(TYPE)) + places
            most = tl.load(largest_vs, there, 0.0).to(tl.float32)
            tl.store(largest_vs, (v_grows * most).to(TYPE), there)


@triton.jit
def _ratios(rest: tl.tensor, taken: tl.tensor, lived: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return ``S(t) / S(k)`` at the next step, and how much it grows from the last to that."""
    old_shared, old_own = _sum(rest, taken), _sum(rest, lived)
    shared, own = old_shared + rest * (1.0 - old_shared), old_own + rest * (1.0 - old_own)
    ratio = shared / own
    grows = ratio * old_own / tl.where(lived > 0, old_shared, 1.0)
    return ratio, tl.where(lived > 0, grows, ratio)


@triton.jit
def _sum(rest: tl.tensor, count: tl.tensor) -> tl.tensor:
    """Return ``1 - (1 - rest)^count`` without taking a number near 1 from 1."""
    total = rest * 0.0
    power = rest
    left = count.to(tl.int32)
    while left > 0:
        total = tl.where(left % 2 == 1, total + power * (1.0 - total), total)
        power = power * (2.0 - power)
        left = left // 2
    return total
