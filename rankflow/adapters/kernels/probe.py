"""The smallest kernel that shows whether Triton works on a device."""

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import _disable_current_modes


def probe(device: torch.device) -> None:
    """Compile and run a product in bfloat16.

    Args:
        device: A GPU.

    Raises:
        RuntimeError: The GPU is older than the kernels' blocks are made for.
        Exception: Whatever the compiler or the driver raises.
    """
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < (8, 0):
        raise RuntimeError(f"they need compute capability 8.0, and it has {capability}")
    # Tensors may be without numbers where somebody asks first.
    with _disable_current_modes(), torch.cuda.device(device):
        square = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        _square[(1,)](square, SIZE=16)
        torch.cuda.synchronize(device)


@triton.jit
def _square(pointer: tl.tensor, SIZE: tl.constexpr) -> None:
    steps = tl.arange(0, SIZE)
    tile = pointer + steps[:, None] * SIZE + steps[None, :]
    values = tl.load(tile)
    tl.store(tile, tl.dot(values, values).to(tl.bfloat16))
