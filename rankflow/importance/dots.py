"""Dot products of parameters' rows with those of their gradients, where a kernel can take them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankflow.adapters.kernels.choose import fits

if TYPE_CHECKING:
    from rankflow.adapters.kernels.row_dots import RowTable


class Dots:
    r"""Computes :math:`\langle w_i, \partial L / \partial w_i \rangle` for rows of many parameters.

    It remembers parameters, so make a new one after every resize.

    Args:
        parameters: Parameters whose rows lie one after the other.
        rows: Rows of each.
        lengths: Entries of each one's rows.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], rows: Sequence[int], lengths: Sequence[int]
    ) -> None:
        self._parameters = tuple(parameters)
        self._known: list[int] = []
        self._types: tuple[torch.dtype, torch.dtype | None] | None = None
        self._table: RowTable | None = None
        is_sharded = any(isinstance(p, DTensor) for p in parameters)
        if parameters and not is_sharded and fits(*parameters):
            from rankflow.adapters.kernels import row_dots  # Triton is optional

            self._table = row_dots.RowTable(rows, lengths, parameters[0].device)

    def read(self, subtracted: Sequence[Tensor] = ()) -> Tensor | None:
        """Return a number a row, float32, shape ``(rows,)``; does not wait for the device.

        Args:
            subtracted: What is taken off each parameter, norms of rows; nothing if empty.

        Returns:
            None where the kernel cannot do it, and torch has to.
        """
        if self._table is None:
            return None
        gradients = [p.grad for p in self._parameters]  # held until the kernel is on its way
        addresses = [p.data_ptr() for p in self._parameters]
        addresses += [0 if g is None else g.data_ptr() for g in gradients]
        addresses += [n.data_ptr() for n in subtracted]
        if addresses != self._known:
            self._types = self._common_types([g for g in gradients if g is not None], subtracted)
            self._known = addresses
        return None if self._types is None else self._table.dots(addresses, *self._types)

    def _common_types(
        self, gradients: Sequence[Tensor], subtracted: Sequence[Tensor]
    ) -> tuple[torch.dtype, torch.dtype | None] | None:
        """Return the type of parameters and gradients, and that of what is subtracted, if any.

        None if not all of them have these types, or they lie otherwise than the table says.
        """
        assert self._table is not None
        own = [*self._parameters, *gradients]
        everything = [*own, *subtracted]
        if own[0].device != self._table.device or not fits(*everything):
            return None
        if not all(tensor.is_contiguous() for tensor in everything):
            return None
        types, others = {t.dtype for t in own}, {t.dtype for t in subtracted}
        if len(types) > 1 or len(others) > 1:
            return None
        return types.pop(), others.pop() if others else None
