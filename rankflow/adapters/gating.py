"""Turn an ordinary adapter into one of gated components, before it has been trained."""

import math
from collections.abc import Mapping, Sequence
from typing import assert_never

import torch
from torch import Tensor, nn

from rankflow.adapters.dora import accelerate_site
from rankflow.adapters.gate import add_gate
from rankflow.adapters.savepoint import renew
from rankflow.adapters.sites import Site
from rankflow.adapters.vera import add_vectors, start_vectors
from rankflow.errors import SiteError
from rankflow.specs.budget import Components


def add_gates(sites: Sequence[Site]) -> None:
    """Put gates of 1 on all components, which changes no output; those that have them keep them.

    Sites with a magnitude get the fast forward of ``accelerate_dora``: PEFT's knows no gate.

    Args:
        sites: All sites of an adapter.
    """
    for site in sites:
        if site.magnitude_slot is not None:
            accelerate_site(site)
        add_gate(site.layer, site.adapter_name)
        site.update_variant()


def convert(sites: Sequence[Site], components: Components) -> None:
    """Give the sites of an untrained adapter the kind of components that a budget asks for."""
    match components:
        case "factors":
            pass
        case "gated":
            add_gates(sites)
        case "vera":
            add_gates(sites)
            add_vectors(sites)
        case _:
            assert_never(components)


def convert_new(sites: Sequence[Site], components: Components, *, is_resumed: bool) -> bool:
    """Convert the sites of an adapter that has no gates yet.

    Args:
        sites: All sites of an adapter.
        components: The kind of components that a budget asks for.
        is_resumed: Whether the adapter may be trained, since a saved state says how it goes on.

    Returns:
        Whether they had none, so that what they start from has to be drawn.

    Raises:
        SiteError: The adapter has been trained, and not as components of that kind.
    """
    if sites[0].gate is not None:
        return False
    if components != "factors" and not is_resumed:
        check_untrained(sites)
    convert(sites, components)
    return True


def start_components(
    sites: Sequence[Site], components: Components, generator: torch.Generator
) -> None:
    """Draw what converted components start from, at the ranks that their sites have now.

    Args:
        sites: The sites.
        components: Their kind.
        generator: A CPU generator.
    """
    match components:
        case "factors":
            pass
        case "gated":
            start_gates(sites, generator)
        case "vera":
            start_vectors(sites)
        case _:
            assert_never(components)


def save_gated(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Return a copy of B and the gates of gated sites: a stock state dict has their product."""
    return {key: factor.detach().clone() for key, factor in _gated_factors(sites).items()}


def load_gated(sites: Sequence[Site], saved: Mapping[str, Tensor]) -> None:
    """Restore what ``save_gated`` returned, at sites of the same ranks."""
    for key, factor in _gated_factors(sites).items():
        renew(factor, saved[key])


def _gated_factors(sites: Sequence[Site]) -> dict[str, nn.Parameter]:
    return {
        f"{site.name}.{name}": factor
        for site in sites
        if site.gate is not None
        for name, factor in (("B", site.B), ("gate", site.gate), ("row_gate", site.row_gate))
        if factor is not None
    }


def check_untrained(sites: Sequence[Site]) -> None:
    """Check that no site changes its layer's output by its components yet.

    Raises:
        SiteError: One does.
    """
    trained = [s.name for s in sites if s.rank > 0 and not _is_zero(s.A) and not _is_zero(s.B)]
    if trained:
        raise SiteError(
            f"{len(trained)} of {len(sites)} sites have been trained, the first is {trained[0]!r}, "
            "and gated components start from gates of 0; begin with a new adapter, or set "
            'components = "factors"'
        )


@torch.no_grad()
def start_gates(sites: Sequence[Site], generator: torch.Generator) -> None:
    """Draw A and B of every gated component from Kaiming's uniform distribution, and set c = 0.

    Args:
        sites: Gated sites.
        generator: A CPU generator; equal seeds give equal factors on every device.
    """
    for site in sites:
        assert site.gate is not None  # the caller has put it there
        A, B = draw_components(site, site.rank, site.rank, generator)
        renew(site.A, A)
        renew(site.B, B)
        renew(site.gate, torch.zeros_like(site.gate))


def _is_zero(factor: Tensor) -> bool:
    return not bool(factor.detach().any())


def draw_components(
    site: Site, count: int, rank: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""Draw rows of A and columns of B as PEFT draws A, by Kaiming's rule with a gain of 1/sqrt(3).

    A is uniform within :math:`\pm 1/\sqrt{in}`, and B within :math:`\pm 1/\sqrt{rank}`.

    Args:
        site: The site that they are for.
        count: Number of components.
        rank: Rank of the site with them.
        generator: A CPU generator.

    Returns:
        A of ``count`` rows and B of ``count`` columns, otherwise of the site's shapes, on the CPU.
    """
    A = torch.rand(count, site.in_features, generator=generator, dtype=torch.float64) * 2 - 1
    B = torch.rand(site.out_features, count, generator=generator, dtype=torch.float64) * 2 - 1
    A = A.div_(math.sqrt(site.in_features)).view(count, *site.A.shape[1:])
    B = B.div_(math.sqrt(max(rank, 1))).view(len(B), count, *site.B.shape[2:])
    return A.to(site.A.dtype), B.to(site.B.dtype)
