"""Adam's correction for young components of all factors at once, where a kernel can make it."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankflow.adapters.adam import MOMENTS, AdamStep
from rankflow.adapters.kernels.choose import fits

if TYPE_CHECKING:
    from rankflow.adapters.kernels.young import YoungTable


class YoungSlices:
    """The young components of many factors; make a new one when these have changed.

    Args:
        factors: The factors.
        slices: Of each slice the index of its factor, the axis, and along it the first index and
            the length.
    """

    def __init__(
        self, factors: Sequence[nn.Parameter], slices: Sequence[tuple[int, int, int, int]]
    ) -> None:
        self._shapes = [factor.shape for factor in factors]
        self._owners = [owner for owner, *_ in slices]
        self._known: list[int] = []
        self._type: torch.dtype | None = None
        self._table: YoungTable | None = None
        rows = [(owner, *lie(self._shapes[owner], *along)) for owner, *along in slices]
        if rows and fits(*factors) and all(size < 2**31 for *_, size in rows):
            from rankflow.adapters.kernels import young  # Triton is optional

            self._table = young.YoungTable(rows, factors[0].device)

    def correct(self, steps: Sequence[AdamStep | None], lived: Sequence[int]) -> bool:
        """Rescale gradients and moments for the next step; does not wait for the device.

        Args:
            steps: Of each factor; None leaves it alone.
            lived: Steps that the components of each slice have lived.

        Returns:
            False where the kernel cannot do it, and torch has to; then nothing has changed.
        """
        if self._table is None:
            return False
        addresses = [address for step in steps for address in _addresses(step)]
        if addresses != self._known:
            self._type = self._common_type(steps)
            self._known = addresses
        if self._type is None:
            return False
        shared = [_numbers(step) for step in steps]
        numbers: list[float] = []
        for owner, age in zip(self._owners, lived, strict=True):
            numbers += shared[owner]
            numbers.append(age)
        self._table.correct(addresses, numbers, self._type)
        return True

    def _common_type(self, steps: Sequence[AdamStep | None]) -> torch.dtype | None:
        """Return the type of gradients and moments, or None if the table does not tell of them."""
        assert self._table is not None
        rescaled, counts = [], []
        for step, shape in zip(steps, self._shapes, strict=True):
            if step is None:
                continue
            moments = [step.state[key] for key in MOMENTS if key in step.state]
            if any(t.shape != shape or not t.is_contiguous() for t in (step.gradient, *moments)):
                return None
            rescaled += [step.gradient, *moments]
            if isinstance(step.taken, Tensor):
                counts.append(step.taken)
        everything = [*rescaled, *counts]
        if not everything or everything[0].device != self._table.device or not fits(*everything):
            return None
        if any(count.dtype != torch.float32 for count in counts):
            return None
        types = {tensor.dtype for tensor in rescaled}
        return types.pop() if len(types) == 1 else None


def _addresses(step: AdamStep | None) -> tuple[int, int, int, int, int]:
    if step is None:
        return 0, 0, 0, 0, 0
    largest, taken = step.state.get("max_exp_avg_sq"), step.taken
    return (
        step.gradient.data_ptr(),
        step.state["exp_avg"].data_ptr(),
        step.state["exp_avg_sq"].data_ptr(),
        0 if largest is None else largest.data_ptr(),
        taken.data_ptr() if isinstance(taken, Tensor) else 0,
    )


def _numbers(step: AdamStep | None) -> tuple[float, float, float]:
    if step is None:
        return 0.0, 0.0, 0.0
    beta1, beta2 = step.betas
    return 0.0 if isinstance(step.taken, Tensor) else step.taken, 1 - beta1, 1 - beta2


def lie(shape: Sequence[int], axis: int, start: int, length: int) -> tuple[int, int, int, int]:
    """Return how a stretch along an axis lies in the memory of a contiguous tensor.

    Args:
        shape: Of the tensor.
        axis: The axis.
        start: First index along it.
        length: Number of indices.

    Returns:
        Offset of its first entry, entries that follow each other, the distance from their first to
        the first of the next ones, and all entries.

    >>> lie((8, 5), 0, 2, 3)
    (10, 15, 40, 15)
    >>> lie((8, 5, 1, 1), 1, 2, 3)
    (2, 3, 5, 24)
    """
    below = math.prod(shape[axis + 1 :])
    inner = length * below
    return start * below, inner, shape[axis] * below, inner * math.prod(shape[:axis])
