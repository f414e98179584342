"""Keep PEFT's own description of an adapter true to its ranks, so that stock code can save it."""

import copy
import re
from collections.abc import Iterable, Sequence

from peft import LoraConfig, PeftModel
from torch import nn

from rankflow.adapters.sites import Site
from rankflow.errors import SiteError

# These initialisations move part of the base weight into the adapter, so they would move another
# part when the adapter is loaded at other ranks.
_INIT_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "mica")


def check_trainable(model: PeftModel, adapter_name: str, sites: Sequence[Site]) -> None:
    """Check that an adapter trains, and nothing of the base model that depends on its ranks.

    Raises:
        SiteError: The adapter is frozen, trains biases, its initialisation changed the base
            weights, or its components cancel out only all together.
    """
    config = model.peft_config[adapter_name]
    check_base(config.init_lora_weights, config.bias, adapter_name)
    if config.init_lora_weights == "orthogonal":
        raise SiteError(
            f"adapter {adapter_name!r} was made with init_lora_weights='orthogonal', whose "
            "components cancel out only all together, so that resizing would change the model; "
            "use True or 'gaussian'"
        )
    frozen = [s.name for s in sites if not all(p.requires_grad for p in s.trained)]
    if frozen:
        raise SiteError(
            f"{len(frozen)} of {len(sites)} sites of adapter {adapter_name!r} are frozen, the "
            f"first is {frozen[0]!r}; activate the adapter with model.set_adapter("
            f"{adapter_name!r}) and load it with is_trainable=True"
        )


def check_initialisation(init: object, adapter_name: str) -> None:
    """Check that an adapter's start left the base weights as they are.

    Args:
        init: ``init_lora_weights`` of its config.
        adapter_name: The adapter.

    Raises:
        SiteError: It did not.
    """
    if isinstance(init, str) and init.lower().startswith(_INIT_CHANGES_BASE):
        raise SiteError(
            f"adapter {adapter_name!r} was made with init_lora_weights={init!r}, which moves part "
            "of the base weight into the adapter at its first rank; use True or 'gaussian'"
        )


def check_base(init: object, bias: str, adapter_name: str) -> None:
    """Check that an adapter leaves the base model's weights and biases alone.

    Args:
        init: ``init_lora_weights`` of its config.
        bias: ``bias`` of its config.
        adapter_name: The adapter.

    Raises:
        SiteError: It does not.
    """
    check_initialisation(init, adapter_name)
    if bias != "none":
        raise SiteError(
            f"adapter {adapter_name!r} was made with bias={bias!r}, which trains biases of the "
            "base model: they belong to no component and no budget, and a site of rank 0 is left "
            "out of the saved adapter, its bias with it; set bias='none'"
        )


def sync_config(model: PeftModel, adapter_name: str, sites: Sequence[Site]) -> None:
    """Give an adapter a ``LoraConfig`` that states the ranks and scales of its sites.

    It takes the place of the one that the model has, which belongs to the caller.

    Args:
        model: The model that gets the config.
        adapter_name: The adapter.
        sites: All of its sites.
    """
    config = stock_config(model, adapter_name, sites)
    for site in sites:  # a state dict holds all magnitudes or none
        site.layer.use_dora[site.adapter_name] = config.use_dora
    model.peft_config[adapter_name] = config


def stock_config(model: PeftModel, adapter_name: str, sites: Sequence[Site]) -> LoraConfig:
    """Return a ``LoraConfig`` that states the ranks and scales of an adapter's sites.

    A dead LoRA site is left out, and a dead DoRA site is described with the one component of zeros
    that its state dict holds (see ``rankflow.adapters.state_dicts``). Where no site has a magnitude
    left, the adapter is plain LoRA.

    Args:
        model: The model.
        adapter_name: The adapter.
        sites: All of its sites.
    """
    config: LoraConfig = copy.copy(model.peft_config[adapter_name])
    present = [site for site in sites if site.rank > 0 or site.magnitude is not None]
    ranks = {site.name: max(site.rank, 1) for site in present}
    alphas = {site.name: plain_alpha(site.scale * ranks[site.name]) for site in present}
    config.r = max(ranks.values(), default=1)
    config.lora_alpha = max(alphas.values(), default=1)
    config.rank_pattern = {exactly(name): rank for name, rank in ranks.items()}
    config.alpha_pattern = {exactly(name): alpha for name, alpha in alphas.items()}
    config.target_modules = exact_targets(ranks, model.get_base_model())
    config.use_rslora = False
    config.use_dora = any(site.magnitude is not None for site in sites)
    config.init_lora_weights = True  # some others demand an even rank when the adapter is loaded
    config.exclude_modules = None
    config.layers_to_transform = None
    config.layers_pattern = None
    return config


def exact_targets(names: Iterable[str], base: nn.Module) -> set[str] | str:
    """Return what PEFT must be given as ``target_modules`` to adapt these modules and no others.

    Args:
        names: Module paths from the base model's root.
        base: The base model, wrapped or not.

    Returns:
        The names, or a regex where PEFT would take a name for the end of another one.
    """
    kept = set(names)
    if _is_suffix_of_another(kept, base):
        return "|".join(re.escape(name) for name in sorted(kept))
    return kept


def _is_suffix_of_another(kept: set[str], base: nn.Module) -> bool:
    for name, _ in base.named_modules():
        suffix = name
        while name not in kept and "." in suffix:
            suffix = suffix.partition(".")[2]
            if suffix in kept:
                return True
    return False


def exactly(name: str) -> str:
    """Return a pattern for PEFT that matches a module path and nothing that ends like it."""
    return f"^{re.escape(name)}"


def plain_alpha(alpha: float) -> float | int:
    """Return an alpha as PEFT writes it: whole where it is whole."""
    return int(alpha) if alpha == int(alpha) else alpha
