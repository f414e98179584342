"""Whether what runs now is recorded into a CUDA graph, to be replayed later without Python."""

import torch
from torch import Tensor


def is_capturing(tensor: Tensor) -> bool:
    """Tell whether work on a tensor is recorded instead of done.

    Args:
        tensor: What is worked on.
    """
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
