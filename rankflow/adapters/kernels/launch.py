"""What all launches share."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def on_device(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a tensor's device the one that Triton launches on.

    Args:
        tensor: On a GPU, or on the CPU for the interpreter.
    """
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def ceil_div(size: int, block: int) -> int:
    """Return how many blocks cover a size.

    >>> ceil_div(65, 64), ceil_div(0, 64)
    (2, 0)
    """
    return -(-size // block)


def power_of_two(size: int, smallest: int, largest: int) -> int:
    """Return the least power of two that holds a size, within bounds that are such powers.

    A kernel is compiled for each block of rank, not for each rank, which changes while training.

    >>> [power_of_two(rank, 16, 128) for rank in (0, 1, 17, 64, 384)]
    [16, 16, 32, 64, 128]
    """
    return min(largest, max(smallest, 1 << max(0, size - 1).bit_length()))
