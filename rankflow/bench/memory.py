"""How much memory the tensors of a computation take at most."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(compute: Callable[[], object], device: torch.device) -> int:
    """Return the most bytes that tensors made by a computation hold at a time.

    On CUDA the allocator counts. Elsewhere the storages that every operation returns are followed
    until they are freed; scratch memory within one operation goes unseen.

    Args:
        compute: The computation.
        device: Where it runs.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        compute()
        return torch.cuda.max_memory_allocated(device) - before
    with _Tally() as tally:
        compute()
    return tally.peak


class _Tally(TorchDispatchMode):
    """Follows the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._living: dict[int, tuple[StorageWeakRef, int]] = {}
        self._live = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and count what it made."""
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        result = operation(*args, **(kwargs or {}))
        self._forget_freed()
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._living:
                self._living[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self._live += storage.nbytes()
        self.peak = max(self.peak, self._live)
        return result

    def _forget_freed(self) -> None:
        freed = [key for key, (reference, _) in self._living.items() if reference.expired()]
        for key in freed:
            self._live -= self._living.pop(key)[1]


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
