r"""VeRA's components: rows of two frozen random matrices that all sites share.

.. math:: \Delta W = s\, \mathrm{diag}(b)\, B\, \mathrm{diag}(d)\, A

(arXiv 2310.11454). Only the vectors are trained: d is the gate of each component and b one factor
an output row. Over DoRA's magnitude this is DVoRA. With ``lora_alpha = r`` in the adapter's config
s is 1, as in the paper.

A site uses the leading columns of A and rows of B, and of the components those that it has not
given up. It holds a copy of these: what is gathered for a forward would be kept for its backward
anyway. So a site costs the memory of frozen LoRA factors, without gradients and moments. Which
components it has is read off its rows of A, so that nothing has to be kept in step with them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rankflow.adapters.gate import add_row_gate
from rankflow.adapters.savepoint import renew
from rankflow.adapters.sites import Site

_D_START = 0.1
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_MATRICES = "vera_matrices"

# Entries by which a row is told from all others: each is random in at least 8 bits.
_FINGERPRINT = 4


@dataclass(frozen=True, slots=True)
class SharedMatrices:
    """The random matrices.

    Attributes:
        A: Shape ``(rank, largest in_features)``, on the CPU.
        B: Shape ``(largest out_features, rank)``, on the CPU.
    """

    A: Tensor
    B: Tensor


def draw_matrices(sites: Sequence[Site], rank: int, seed: int) -> SharedMatrices:
    """Draw matrices for all sites, equal to those of PEFT's ``VeraConfig`` with that rank and key.

    Args:
        sites: The sites.
        rank: Components in all, no fewer than any site may have.
        seed: PEFT's ``projection_prng_key``.
    """
    generator = torch.Generator().manual_seed(seed)
    width = max(site.in_features for site in sites)
    height = max(site.out_features for site in sites)
    return SharedMatrices(_kaiming((rank, width), generator), _kaiming((height, rank), generator))


def add_vectors(sites: Sequence[Site]) -> None:
    """Freeze A and B of gated sites, and put factors of 1 on the output rows.

    Args:
        sites: Gated sites.
    """
    for site in sites:
        layer, name = site.layer, site.adapter_name
        # PEFT unfreezes whatever belongs to the active adapter and is not named here.
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, name: _FACTORS}
        site.A.requires_grad_(False)
        site.B.requires_grad_(False)
        add_row_gate(layer, name)


def share_matrices(sites: Sequence[Site], matrices: SharedMatrices) -> None:
    """Let newborns of the sites be drawn from the matrices."""
    for site in sites:
        known = getattr(site.layer, _MATRICES, {})
        setattr(site.layer, _MATRICES, {**known, site.adapter_name: matrices})


@torch.no_grad()
def start_vectors(sites: Sequence[Site]) -> None:
    """Give every site the first components of the matrices, under d = 0.1 and b = 0."""
    for site in sites:
        assert site.gate is not None  # the caller has put both there
        assert site.row_gate is not None
        A, B = _components(site, torch.arange(site.rank))
        renew(site.A, A)
        renew(site.B, B)
        renew(site.gate, torch.full_like(site.gate, _D_START))
        renew(site.row_gate, torch.zeros_like(site.row_gate))


def draw_unused(
    site: Site, live: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw components of the shared matrices that a site does not have.

    Args:
        site: A VeRA site.
        live: Its live rows of A, shape ``(rank, ...)``.
        count: Number of components wanted.
        generator: A CPU generator.

    Returns:
        A of ``count`` rows and B of ``count`` columns, otherwise of the site's shapes, on the CPU.
    """
    length = min(_FINGERPRINT, site.in_features)
    mine = live.detach().flatten(1)[:, :length].cpu()
    theirs = _matrices(site).A[:, :length].to(live.dtype)
    is_used = (theirs.unsqueeze(1) == mine).all(dim=2).any(dim=1)
    free = (~is_used).nonzero().flatten()
    return _components(site, free[torch.randperm(len(free), generator=generator)[:count]])


def _components(site: Site, index: Tensor) -> tuple[Tensor, Tensor]:
    matrices = _matrices(site)
    A = matrices.A[index, : site.in_features].reshape(-1, *site.A.shape[1:])
    B = matrices.B[: site.out_features, index]
    return A.to(site.A.dtype), B.reshape(*B.shape, *site.B.shape[2:]).to(site.B.dtype)


def _matrices(site: Site) -> SharedMatrices:
    matrices: SharedMatrices = getattr(site.layer, _MATRICES)[site.adapter_name]
    return matrices


def _kaiming(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Draw from Kaiming's uniform distribution for ReLU, like PEFT and the paper."""
    bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
