"""One number for each site that tells adapters apart which differ in a single bit."""

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from rankflow.adapters.sites import Site

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Entries at a time: as whole numbers, with their places, they take eight times their memory.
_PIECE = 2**18


@torch.no_grad()
def fingerprints(sites: Sequence[Site], optimizer: Optimizer | None) -> list[int]:
    """Return a number for ranks, parameters and optimizer state of each site.

    It is a sum of the tensors' bits, each weighted by its place, modulo 2^64: whole numbers, so
    that every device finds the same. They are computed on the device, and copied once.

    Args:
        sites: The sites.
        optimizer: The optimizer that trains them, or None.
    """
    return _read(sites, [_state(site, optimizer) for site in sites])


@torch.no_grad()
def gradient_fingerprints(sites: Sequence[Site]) -> list[int]:
    """Return such a number for the gradients of each site, 0 where there is none.

    Args:
        sites: The sites.
    """
    gradients = [[p.grad for p in site.named_parameters.values()] for site in sites]
    return _read(sites, [[g for g in parts if g is not None] for parts in gradients])


def _read(sites: Sequence[Site], tensors: Sequence[Iterable[Tensor]]) -> list[int]:
    home = sites[0].A.device
    nothing = torch.zeros((), dtype=torch.int64, device=home)
    sums = []
    for of_site in tensors:
        parts = [_sum(tensor).to(home, non_blocking=True) for tensor in of_site]
        sums.append(_sum(torch.stack(parts)) if parts else nothing)
    found: list[int] = torch.stack(sums).tolist()
    return found


def _state(site: Site, optimizer: Optimizer | None) -> Iterator[Tensor]:
    yield torch.tensor(site.rank, device=site.A.device)
    for parameter in site.named_parameters.values():
        yield parameter
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        yield from (value for value in state.values() if isinstance(value, Tensor))


def _sum(tensor: Tensor) -> Tensor:
    bits = tensor.detach().contiguous().view(-1).view(_BITS[tensor.element_size()])
    pieces = [_weigh(piece, i * _PIECE) for i, piece in enumerate(bits.split(_PIECE))]
    return torch.stack(pieces).sum() + 31 * len(bits)


def _weigh(bits: Tensor, first: int) -> Tensor:
    places = torch.arange(first + 1, first + 1 + len(bits), device=bits.device)
    return (bits.long() * (places * 0x9E3779B97F4A7C1)).sum()
