r"""How long a machine takes for what a ledger says, by a few constants of the machine.

An operation of f multiplications and additions that moves b bytes takes

.. math:: h + f / F + b / B \quad\text{or}\quad \max(h, f / F, b / B)

on a machine that does not, or does, compute while it moves data: a core of a CPU, or a GPU (the
roofline of Williams et al. 2009), whose launches overlap with work as well.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.optimize import least_squares

from rankflow.bench.ledger import Operation


@dataclass(frozen=True, slots=True)
class Machine:
    """The constants of a machine.

    Attributes:
        flops: F, multiplications and additions a second, in products of bfloat16.
        wide_flops: The same in products of float32.
        bandwidth: B, bytes a second.
        latency: h, seconds of an operation that does nothing.
        overlaps: Whether it computes while it moves data.
    """

    flops: float
    wide_flops: float
    bandwidth: float
    latency: float
    overlaps: bool

    def seconds(self, operations: Sequence[Operation]) -> float:
        """Return the seconds that operations take, one after the other."""
        return sum(self._seconds(operation) for operation in operations)

    def _seconds(self, operation: Operation) -> float:
        flops = self.wide_flops if operation.is_wide else self.flops
        compute, move = operation.flops / flops, operation.bytes / self.bandwidth
        if self.overlaps:
            return max(compute, move, self.latency)
        return compute + move + self.latency


H200: Final = Machine(
    flops=0.7 * 989e12,
    wide_flops=0.8 * 67e12,  # torch does not use TF32 unless it is told to
    bandwidth=0.85 * 4.8e12,
    latency=3e-6,
    overlaps=True,
)
"""NVIDIA's data sheet for the H200 SXM, and the share of it that large operations reach."""


def calibrate(
    pairs: Sequence[tuple[Sequence[Operation], Sequence[Operation]]], seconds: Sequence[float]
) -> Machine:
    """Find the constants of a CPU, from differences between computations of float32.

    Args:
        pairs: Two computations each.
        seconds: By how many seconds the first of each took longer.

    Returns:
        The machine of which the relative errors are least in square.
    """

    def errors(logs: np.ndarray) -> list[float]:
        machine = _cpu(logs)
        gaps = [machine.seconds(more) - machine.seconds(less) for more, less in pairs]
        return [gap / measured - 1 for gap, measured in zip(gaps, seconds, strict=True)]

    guess = np.log([1e11, 1e10, 3e-6])
    return _cpu(least_squares(errors, guess).x)


def _cpu(logs: np.ndarray) -> Machine:
    flops, bandwidth, latency = np.exp(logs)
    return Machine(flops, flops, bandwidth, latency, overlaps=False)
