"""Numbers of the host that a kernel reads: addresses of tensors, and what changes at every step."""

import torch
import triton.language as tl
from torch import Tensor

# An address has no type, so the kernel is told it.
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Addresses:
    """Brings addresses of tensors to a device, and only if one has changed.

    The caller takes them from the tensors at every launch, and holds these until then. What a
    kernel reads is the memory of tensors that live at the launch, on the stream of the launch; what
    comes after it on that stream may free them. On another stream they are brought anew.

    Args:
        device: Where the tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known: tuple[int, list[int]] = (0, [])
        self._there = torch.zeros(0, dtype=torch.int64, device=device)

    def bring(self, addresses: list[int]) -> Tensor:
        """Return the addresses on the device, int64, without waiting."""
        known = (_stream(self._device), addresses)
        if known != self._known:
            self._there = upload(torch.tensor(addresses, dtype=torch.int64), self._device)
            self._known = known
        return self._there


def upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Bring numbers to the device; its allocator keeps the host's copy until it has arrived."""
    here = numbers.pin_memory() if device.type == "cuda" else numbers
    return here.to(device, non_blocking=True)


def _stream(device: torch.device) -> int:
    """Name the stream of the launch: memory is in order on the stream that it was made on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
