"""How long a computation takes, on a device that works behind our back."""

import itertools
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


class Laps:
    """Times the parts of a computation by the device's own clock, without waiting in between.

    Idle time of a device that waits for the host counts.

    Args:
        device: Where it runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[torch.Event | float] = []

    def mark(self) -> None:
        """End a lap and begin the next."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.Event(device=self._device, enable_timing=True)
        event.record()
        self._marks.append(event)

    def read(self) -> list[float]:
        """Wait for the device; return the seconds of each lap."""
        _wait_for(self._device)
        return [_between(*pair) for pair in itertools.pairwise(self._marks)]


def _between(first: torch.Event | float, last: torch.Event | float) -> float:
    if isinstance(first, torch.Event) and isinstance(last, torch.Event):
        return first.elapsed_time(last) / 1e3  # milliseconds
    assert isinstance(first, float)
    assert isinstance(last, float)
    return last - first


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
