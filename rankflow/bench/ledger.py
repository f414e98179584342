"""What a computation does, operation by operation: arithmetic and memory traffic.

The counts do not depend on the machine, so they are taken from whatever can run the code: a CPU, or
tensors without numbers. A few constants of a machine turn them into seconds.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rankflow.memory import tensors_in

_aten = torch.ops.aten
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation.

    Attributes:
        name: Its name, such as ``aten.mm``.
        flops: Multiplications and additions, of products alone.
        bytes: What it reads and writes, each tensor once.
        is_wide: Whether a product is one of float32, which most hardware takes longer for.
    """

    name: str
    flops: int
    bytes: int
    is_wide: bool


class Ledger(TorchDispatchMode):
    """Notes every operation that moves data; views and bare allocations cost nothing.

    Attributes:
        operations: What was noted, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operation and note it."""
        kwargs = kwargs or {}
        result = operation(*args, **kwargs)
        given = tensors_in((args, kwargs))
        made = tensors_in(result)
        if _is_view(operation, given, made) or _only_allocates(operation):
            return result
        packet = _IN_PLACE.get(operation._overloadpacket, operation._overloadpacket)
        count = flop_registry.get(packet)
        flops = 0 if count is None else count(*args, **kwargs, out_val=result)
        flops += _flops_of_kernel(packet.__name__, args)
        read = [] if _only_writes(operation) else given
        moved = sum(_bytes(t) for t in [*read, *made])
        is_wide = flops > 0 and given[0].element_size() >= 4
        name = str(operation._overloadpacket)
        self.operations.append(Operation(name, int(flops), moved, is_wide))
        return result


def ledger_of(compute: Callable[[], object]) -> list[Operation]:
    """Return the operations of a computation, in order."""
    with Ledger() as ledger:
        compute()
    return ledger.operations


def _is_view(operation: Any, given: list[Tensor], made: list[Tensor]) -> bool:
    """Whether an operation only looks at its input in another way."""
    if operation._schema.is_mutable or not made:
        return not made
    storages = {t.untyped_storage()._cdata for t in given}
    return all(t.untyped_storage()._cdata in storages for t in made)


def _flops_of_kernel(name: str, args: Sequence[Any]) -> int:
    """Return the arithmetic of the product in one of RankFlow's own kernels."""
    if name == "row_norms":
        weight, A = args[:2]
        terms = 2 if weight.element_size() < A.element_size() else 1  # of A, see kernels/norm.py
        return 2 * terms * weight.numel() * len(A)
    if name in ("mix", "mix_gradients"):
        hidden = args[1 if name == "mix" else 2]
        return 2 * args[0].numel() * len(hidden)
    return 0


def _only_writes(operation: Any) -> bool:
    """Whether an operation takes from its input the shape alone."""
    name = operation._overloadpacket.__name__
    return name.startswith("new_") or name.endswith("_like")


def _only_allocates(operation: Any) -> bool:
    """Whether an operation reserves memory, and touches none."""
    return "empty" in operation._overloadpacket.__name__


def _bytes(tensor: Tensor) -> int:
    """Bytes that reading a tensor takes; what is spread over an axis is read once."""
    entries = math.prod(
        size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride != 0
    )
    return entries * tensor.element_size() if tensor.numel() else 0
