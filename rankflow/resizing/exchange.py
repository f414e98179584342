"""What processes that each hold some rows bring together at an event: one sum over all of them.

Each fills in what it holds and leaves zeros elsewhere, so the sum is the whole, exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankflow.adapters.sites import Site
from rankflow.adapters.slots import local
from rankflow.resizing.slot_scores import count_slots, first_slots, slots_of


@dataclass(frozen=True, slots=True)
class Exchange:
    """What is exchanged, and views into it.

    Attributes:
        flat: All of it, to be summed over the processes in place.
        scores: Scores of all slots, shape ``(slots,)``.
        rows: Live rows of each site, ``(rank, width)``; see ``Site.live_rows``.
    """

    flat: Tensor
    scores: Tensor
    rows: list[Tensor]


def prepare(sites: Sequence[Site], scores: Tensor | None) -> Exchange:
    """Return this process's share of the scores and live rows of all sites.

    Args:
        sites: The sites, which have slots.
        scores: Its share of the scores, shape ``(slots,)``, or None if they need no exchange.
    """
    shapes = [(site.rank, _width(site)) for site in sites]
    slots = count_slots(slots_of(sites))
    sizes = [slots, *(rank * width for rank, width in shapes)]
    home, dtype = sites[0].A.device, torch.promote_types(sites[0].A.dtype, torch.float32)
    flat = torch.zeros(sum(sizes), device=home, dtype=dtype)
    own, *parts = flat.split(sizes)
    if scores is not None:
        own.copy_(scores)
    rows = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    for site, view in zip(sites, rows, strict=True):
        _fill(site, view)
    return Exchange(flat, own, rows)


def sizes(sites: Sequence[Site]) -> Tensor:
    r"""Return this process's share of the squares :math:`\lVert a_i \rVert^2, \lVert b_i \rVert^2`.

    Args:
        sites: The sites, which have slots.

    Returns:
        Shape ``(2, slots)``.
    """
    slots = slots_of(sites)
    squares = torch.zeros(2, count_slots(slots), device=sites[0].A.device)
    for first, s in zip(first_slots(slots), slots, strict=True):
        A, B = local(s.A).flatten(1).float(), local(s.B).flatten(1).float()
        squares[0, first + s.here.start : first + s.here.stop] = A.square().sum(dim=1)
        squares[1, first : first + s.capacity] = B.square().sum(dim=0)
    return squares


def _width(site: Site) -> int:
    return site.out_features if site.kind == "embedding" else site.in_features


def _fill(site: Site, view: Tensor) -> None:
    (slots,) = slots_of([site])
    if site.kind == "embedding":
        here = slots.outputs_here
        view[:, here.start : here.stop] = local(slots.B)[:, slots.live].T
        return
    own = [(i, slot - slots.here.start) for i, slot in enumerate(slots.live) if slot in slots.here]
    if own:
        to, out_of = zip(*own, strict=True)
        view[list(to)] = local(slots.A)[list(out_of)].flatten(1).to(view)
