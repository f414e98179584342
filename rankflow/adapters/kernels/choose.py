"""Whether Triton kernels can take the place of torch code.

Triton is no dependency: builds of torch for CUDA and ROCm bring it, others do not, and it needs a C
compiler where it runs. So the first question on a device is answered by a kernel that does next to
nothing, compiled and run once. On a CPU the kernels run only in Triton's interpreter, which checks
them and is slow; it is on where ``TRITON_INTERPRET=1`` was set before Python started.
"""

import logging
import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

_PLAIN = (Tensor, nn.Parameter)  # not sharded, fake or quantised
_TYPES = (torch.float32, torch.bfloat16, torch.float16)

_works: dict[int, bool] = {}  # by the index of the device


def fits(*tensors: Tensor) -> bool:
    """Tell whether Triton kernels can run on these tensors.

    It waits for the device at most once, at its first use on a device, and never while a CUDA graph
    is captured: there it says no as long as it does not know. ``RANKFLOW_TRITON=0`` turns the
    kernels off.

    Args:
        tensors: What a kernel would read, at least one.
    """
    device = tensors[0].device
    for tensor in tensors:
        if type(tensor) not in _PLAIN or tensor.device != device or tensor.dtype not in _TYPES:
            return False
    return _can_run(device.type, device.index or 0)


@torch.compiler.assume_constant_result
def _can_run(kind: str, index: int) -> bool:
    if os.environ.get("RANKFLOW_TRITON") == "0":
        return False
    if kind == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
    if kind != "cuda" or not torch.cuda.is_available():
        return False
    if index not in _works:
        if torch.cuda.is_current_stream_capturing():
            return False
        _works[index] = _try(index)
    return _works[index]


def _try(index: int) -> bool:
    try:
        from rankflow.adapters.kernels.probe import probe  # Triton is optional

        probe(torch.device("cuda", index))
    except Exception as error:  # compilers and drivers raise what they like
        logger.warning(
            "Triton kernels do not run on cuda:%d, so RankFlow uses its torch code, which is "
            "slower: %s: %s. Set RANKFLOW_TRITON=0 to use it without this warning.",
            index,
            type(error).__name__,
            error,
        )
        return False
    return True
