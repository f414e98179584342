"""How long a computation takes, on a device that works behind our back."""

import time
from collections.abc import Callable

import torch


def seconds(act: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of a computation, from an idle device to an idle device.

    Args:
        act: The computation.
        device: Where it runs.
    """
    _wait_for(device)
    began = time.perf_counter()
    act()
    _wait_for(device)
    return time.perf_counter() - began


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
