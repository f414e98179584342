"""Where a newborn component points: three ways to draw its row of A.

A newborn starts with ``b = 0``, so its row ``a`` alone decides what it can learn first: b receives
the gradient ``s G a``, where G is the gradient of the site's effective direction. (For embeddings
the roles are swapped, as in PEFT, and the column of B is drawn.)
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankflow.records import SiteKind

Rows = Callable[[int, Tensor, int], Tensor]
"""Draws newborns: (index of the site, its live rows ``(rank, width)``, births) to float64 rows
``(births, width)`` on the CPU, whose mean square length is 1."""

Directions = Callable[[int, int, Tensor], Tensor]
"""Proposes directions: (index of the site, how many at most, live rows to stay away from) to unit
rows, best first and orthogonal to the live ones and to each other."""


@dataclass(frozen=True, slots=True)
class Newborns:
    """How the newborns of one event are drawn.

    Attributes:
        rows: Draws their rows of A (embeddings: columns of B).
        generator: A CPU generator for what has no direction to follow.
    """

    rows: Rows
    generator: torch.Generator


def orthogonal(generator: torch.Generator) -> Newborns:
    """Draw newborns at random in the complement of what the site spans.

    Args:
        generator: A CPU generator; equal seeds give equal rows on every device.
    """

    def draw(index: int, live: Tensor, births: int) -> Tensor:
        return orthogonal_rows(live, births, generator)

    return Newborns(draw, generator)


def kaiming(kinds: Sequence[SiteKind], generator: torch.Generator) -> Newborns:
    """Draw newborns as PEFT initialises: uniform rows of A, normal columns of an embedding's B.

    Args:
        kinds: The kind of each site.
        generator: A CPU generator; equal seeds give equal rows on every device.
    """

    def draw(index: int, live: Tensor, births: int) -> Tensor:
        rows = torch.empty(births, live.shape[1], dtype=torch.float64)
        if kinds[index] == "embedding":
            rows.normal_(generator=generator)
        else:
            rows.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        return rows / math.sqrt(live.shape[1])

    return Newborns(draw, generator)


def along(directions: Directions, generator: torch.Generator) -> Newborns:
    """Point newborns along proposed directions, and draw orthogonal rows for what these lack.

    Args:
        directions: Proposes directions, such as those in which the gradient is largest.
        generator: A CPU generator for the rest.
    """

    def draw(index: int, live: Tensor, births: int) -> Tensor:
        found = directions(index, births, live).to("cpu", torch.float64)
        taken = torch.cat([live.detach().to("cpu", torch.float64), found])
        return torch.cat([found, orthogonal_rows(taken, births - len(found), generator)])

    return Newborns(draw, generator)


def orthogonal_rows(live: Tensor, births: int, generator: torch.Generator) -> Tensor:
    """Draw unit rows orthogonal to the live ones and to each other.

    Args:
        live: Live rows, shape ``(rank, width)``; they need not be orthogonal.
        births: Number of rows wanted, at most ``width - rank``.
        generator: A CPU generator; equal seeds give equal rows on every device.

    Returns:
        Rows of shape ``(births, width)``, float64 on the CPU.
    """
    draws = torch.randn(births, live.shape[1], generator=generator, dtype=torch.float64)
    basis = torch.cat([live.detach().to("cpu", torch.float64), draws])  # (rank + births, width)
    orthonormal = torch.linalg.qr(basis.T).Q  # columns after the first `rank` span the complement
    return orthonormal.T[len(live) :]
