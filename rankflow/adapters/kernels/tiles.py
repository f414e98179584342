"""Products of tiles, and sums of what programs left."""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Norms are kept from falling below it, so that a row of zeros is known by it.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)


def dot_precision(tensor: Tensor) -> str:
    """Return how `dot` shall multiply on a tensor's device.

    Tensor cores of NVIDIA read 11 bits of each factor of a product in float32. Three products of
    leading and remaining bits give nearly all 24 back, and are still faster than the units for
    float32. Triton offers this for NVIDIA alone. Its interpreter multiplies the bits of bfloat16
    as if they were integers, so there everything is float32.
    """
    if tensor.device.type == "cpu":
        return "widened"
    return "ieee" if torch.version.hip else "tf32x3"


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, total: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """Return ``total + a @ b`` in float32."""
    if PRECISION == "widened":
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def sum_of_parts(
    parts: tl.tensor, count: tl.tensor, places: tl.tensor, size: tl.tensor
) -> tl.tensor:
    """Return the sum over the rows of ``parts``, ``(count, size)``, at some places of a row.

    Many rows are loaded at a time, for one after the other would wait for memory each time.
    """
    total = tl.zeros(places.shape, tl.float32)
    steps = tl.arange(0, 16)
    for start in range(0, count, 16):
        rows = (start + steps).to(tl.int64)[:, None]
        mask = (rows < count) & (places < size)[None, :]
        total += tl.sum(tl.load(parts + rows * size + places[None, :], mask, 0.0), 0)
    return total
