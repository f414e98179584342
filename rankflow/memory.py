"""How much memory the tensors of a computation take at most."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(
    compute: Callable[[], object], device: torch.device, held: Iterable[Tensor] = ()
) -> int:
    """Return the most bytes that tensors hold at a time during a computation.

    On CUDA the allocator counts, scratch memory included; elsewhere `tally_bytes` does.

    Args:
        compute: The computation.
        device: Where it runs.
        held: Tensors of that device that are there before; without them only what the computation
            makes is counted.
    """
    if device.type == "cuda":
        already = storage_bytes(held)
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before + already
    return tally_bytes(compute, held)


def tally_bytes(compute: Callable[[], object], held: Iterable[Tensor] = ()) -> int:
    """Like `peak_bytes`, on any device, and for tensors that have no numbers.

    The storages that every operation returns are followed until they are freed; scratch memory
    within one operation goes unseen.

    Args:
        compute: The computation.
        held: Tensors that are there before, counted as long as they live.
    """
    with _Tally(held) as tally:
        compute()
    return tally.peak


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes behind tensors, those of a shared storage once.

    >>> whole = torch.zeros(8)
    >>> storage_bytes([whole, whole[:2]])
    32
    """
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


class _Tally(TorchDispatchMode):
    """Follows the storages that operations make."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self._young: dict[int, tuple[StorageWeakRef, int]] = {}
        self._old: dict[int, tuple[StorageWeakRef, int]] = {}  # there at the last peak
        self._live = 0  # bytes, those freed since the last look included
        for tensor in held:
            self._add(tensor)
        self.peak = self._live

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        given = {t.untyped_storage()._cdata for t in tensors_in((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            if tensor.untyped_storage()._cdata not in given:
                self._add(tensor)
        if self._live > self.peak:
            self._forget_freed(self._young)
        if self._live > self.peak:  # only now are the weights worth a look
            self._old |= self._young
            self._young = {}
            self._forget_freed(self._old)
            self.peak = max(self.peak, self._live)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._young and storage._cdata not in self._old:
            self._young[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._live += storage.nbytes()

    def _forget_freed(self, storages: dict[int, tuple[StorageWeakRef, int]]) -> None:
        freed = [key for key, (reference, _) in storages.items() if reference.expired()]
        for key in freed:
            self._live -= storages.pop(key)[1]


def tensors_in(tree: Any) -> list[Tensor]:
    """Return all tensors in nested lists, tuples and dicts."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
