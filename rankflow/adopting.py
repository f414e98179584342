"""An optimizer comes to train an adapter: what it must hold, and what it has to be given."""

from collections.abc import Sequence

from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor
from torch.optim import Optimizer

from rankflow.adapters.optimizer_state import FACTORED, places_in
from rankflow.adapters.sites import Site
from rankflow.errors import SurgeryError


def unwrap(optimizer: Optimizer) -> Optimizer:
    """Return the optimizer that Accelerate has wrapped, or the optimizer itself."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


def adopt(sites: Sequence[Site], optimizer: Optimizer) -> None:
    """Let an optimizer train gates that it does not know, and check that it trains all sites.

    Args:
        sites: The sites of an adapter.
        optimizer: The optimizer, unwrapped.

    Raises:
        SurgeryError: It does not train a site, or has trained it at another rank or without its
            gate.
    """
    for site in sites:
        _adopt_gate(site, optimizer)
    held = places_in(optimizer)
    for site in sites:
        if not all(parameter in held for parameter in site.trained):
            raise SurgeryError(
                f"the optimizer does not train the adapter of site {site.name!r}; build it "
                "from the model's trainable parameters, and pass flow.step() that optimizer"
            )
        _check_state(site, optimizer)


def _adopt_gate(site: Site, optimizer: Optimizer) -> None:
    """Let an optimizer that was made before a site got its gates train them, in the group of B.

    They come to stand where an optimizer made afterwards has them, and factors that are frozen now
    go, so that their states match.

    Args:
        site: The site; without a gate nothing happens.
        optimizer: The optimizer that trains A and B; it must not have taken a step yet.

    Raises:
        SurgeryError: The optimizer has trained the site without its gate.
    """
    if site.gate is None:
        return
    places = places_in(optimizer)
    if site.gate in places or site.B not in places:
        return
    if optimizer.state.get(site.B):
        raise SurgeryError(
            f"the optimizer has taken steps without the gates of site {site.name!r}; make it after "
            "RankFlow, or call flow.attach(optimizer) before its first step"
        )
    group, _ = places[site.B]
    before = [p for p in site.named_parameters.values() if p in places and places[p][0] == group]
    last = max(places[p][1] for p in before)
    gates = [site.gate] if site.row_gate is None else [site.gate, site.row_gate]
    params = optimizer.param_groups[group]["params"]
    params[last + 1 : last + 1] = gates
    frozen = [factor for factor in (site.A, site.B) if not factor.requires_grad]
    params[:] = [p for p in params if not any(p is factor for factor in frozen)]


def _check_state(site: Site, optimizer: Optimizer) -> None:
    """Check that the optimizer's state has the shapes of the site's factors.

    A fused optimizer does not check them, and would write beyond the state's memory.

    Args:
        site: The site.
        optimizer: The optimizer that trains it.

    Raises:
        SurgeryError: The optimizer has taken steps while the site had another rank.
    """
    for parameter, _ in site.factors:
        for key, value in optimizer.state.get(parameter, {}).items():
            is_whole = isinstance(value, Tensor) and value.ndim > 0 and key not in FACTORED
            if is_whole and value.numel() > 1 and value.shape != parameter.shape:
                raise SurgeryError(
                    f"the optimizer has trained site {site.name!r} at another rank: its state "
                    f"{key!r} has shape {tuple(value.shape)}, and the parameter "
                    f"{tuple(parameter.shape)}; begin with a new optimizer, and in a Trainer with "
                    "a new Trainer"
                )
