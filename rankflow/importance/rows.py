"""Rows of many small matrices, gathered into one dense matrix per width.

A model has hundreds of adapter tensors and each is tiny, so a scorer that visits them one by one
pays for kernel launches, not for arithmetic. Components of equal width are stacked instead: a
transformer has two to four widths, and one call per width handles all of its layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local


@dataclass(frozen=True, slots=True)
class _Stack:
    members: tuple[int, ...]  # positions of the stacked matrices
    device: torch.device


class Rows:
    """The rows of one factor (A, B transposed, or the gates) of every site, stacked by width.

    It remembers parameters, so make a new one after every resize. Of sharded parameters it sees
    what this process holds.

    Args:
        parameters: One tensor a site.
        as_rows: Turns such a tensor, or its gradient, into ``(rank, width)``.

    Attributes:
        parameters: As given.
        ranks: Rows of each site.
        widths: Entries of a row of each site.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], as_rows: Callable[[Tensor], Tensor]
    ) -> None:
        self.parameters = tuple(parameters)
        self._as_rows = as_rows
        self._is_sharded = any(isinstance(p, DTensor) for p in parameters)
        shapes = [as_rows(local(p)).shape for p in parameters]
        self.ranks = [shape[0] for shape in shapes]
        self.widths = [shape[1] for shape in shapes]
        members: dict[tuple[torch.device, int], list[int]] = {}
        for i, (rank, width) in enumerate(shapes):
            if rank > 0:
                members.setdefault((parameters[i].device, width), []).append(i)
        self._stacks = [_Stack(tuple(m), device) for (device, _), m in members.items()]
        self._home = parameters[0].device
        self._order = self._component_order().to(self._home)

    @classmethod
    def of_A(cls, sites: Sequence[Site]) -> "Rows":  # noqa: N802
        """Rows ``a_i`` of every A, each of width ``in_features``."""
        return cls([site.A for site in sites], lambda t: t if t.ndim == 2 else t.flatten(1))

    @classmethod
    def of_B(cls, sites: Sequence[Site]) -> "Rows":  # noqa: N802
        """Columns ``b_i`` of every B, each of width ``out_features``."""
        return cls([site.B for site in sites], lambda t: t.flatten(1).T)

    @classmethod
    def of_gates(cls, sites: Sequence[Site]) -> "Rows":
        """Gates ``c_i`` of gated sites, as rows of width 1."""
        gates = [site.gate for site in sites]
        return cls([gate for gate in gates if gate is not None], lambda t: t.unsqueeze(1))

    def weights(self) -> list[Tensor]:
        """Return the values, a float tensor ``(rows, width)`` for each width."""
        return self._stacked(self.parameters)

    def gradients(self) -> list[Tensor]:
        """Return the gradients like ``weights``; a parameter without one counts as zero."""
        gradients = [p.grad for p in self.parameters]
        pairs = zip(gradients, self.parameters, strict=True)
        return self._stacked([torch.zeros_like(p) if g is None else g for g, p in pairs])

    def per_component(self, per_row: Sequence[Tensor]) -> Tensor:
        """Bring one number a row, given for each width, into component order, shape ``(C,)``."""
        if not per_row:
            return torch.zeros(0, device=self._home)
        flat = torch.cat([values.to(self._home, non_blocking=True) for values in per_row])
        return flat.index_select(0, self._order)

    def split(self, stacked: Sequence[Tensor]) -> list[Tensor]:
        """Cut stacked matrices back into one ``(rank, width)`` tensor a site."""
        parts = [
            torch.zeros((0, width), device=p.device)
            for p, width in zip(self.parameters, self.widths, strict=True)
        ]
        for stack, matrix in zip(self._stacks, stacked, strict=True):
            pieces = matrix.split([self.ranks[i] for i in stack.members])
            for i, piece in zip(stack.members, pieces, strict=True):
                parts[i] = piece
        return parts

    def join(self, part: Callable[[int], Tensor]) -> list[Tensor]:
        """Stack one ``(rank, width)`` tensor a site, asked for one after the other.

        Args:
            part: Returns that of a site, given by its index.
        """
        return [self._join(stack, part) for stack in self._stacks]

    def _join(self, stack: _Stack, part: Callable[[int], Tensor]) -> Tensor:
        first, ranks = stack.members[0], [self.ranks[i] for i in stack.members]
        dtype = torch.promote_types(self.parameters[first].dtype, torch.float32)
        shape = (sum(ranks), self.widths[first])
        joined = torch.empty(shape, device=stack.device, dtype=dtype)
        for i, rows in zip(stack.members, joined.split(ranks), strict=True):
            rows.copy_(part(i))
        return joined

    @torch.no_grad()
    def _stacked(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._is_sharded:
            tensors = [local(tensor) for tensor in tensors]
        joined = [torch.cat([self._as_rows(tensors[i]) for i in s.members]) for s in self._stacks]
        return [rows.to(torch.promote_types(rows.dtype, torch.float32)) for rows in joined]

    def _component_order(self) -> Tensor:
        starts = torch.tensor([0, *self.ranks]).cumsum(0)
        stacked = [
            torch.arange(self.ranks[i]) + starts[i] for stack in self._stacks for i in stack.members
        ]
        return torch.cat(stacked).argsort() if stacked else torch.zeros(0, dtype=torch.long)
