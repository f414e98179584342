"""DoRA's factors :math:`m / n` at an event, for which each base weight is gathered in turn."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule

from rankflow.adapters.base_weight import magnitude_factor
from rankflow.adapters.row_norms import measure_norms
from rankflow.adapters.sites import Site
from rankflow.resizing.slot_scores import slots_of


@torch.no_grad()
def note_row_factors(model: PeftModel, sites: Sequence[Site]) -> None:
    """Measure the factors of all DoRA sites and leave them in their slots.

    All processes have to call it: it gathers one FSDP unit after the other, as a forward does.
    """
    for owner, members in _by_owner(model, sites).items():
        owner.unshard()
        try:
            for site in members:
                _note(site)
        finally:
            owner.reshard()


def _note(site: Site) -> None:
    layer, name = site.layer, site.adapter_name
    if site.kind == "embedding":
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    norms = measure_norms(layer, A, B, site.scale)
    (slots,) = slots_of([site])
    slots.row_factor = magnitude_factor(layer.lora_magnitude_vector[name].weight, norms)


def _by_owner(model: PeftModel, sites: Sequence[Site]) -> dict[FSDPModule, list[Site]]:
    """Group DoRA sites by the nearest FSDP unit that they are in."""
    names = {id(module): name for name, module in model.named_modules()}
    owners: dict[FSDPModule, list[Site]] = {}
    for site in sites:
        if site.magnitude_slot is not None:
            path = names[id(site.layer)].split(".")
            above = [model.get_submodule(".".join(path[:n])) for n in range(len(path) + 1)]
            owner = [module for module in above if isinstance(module, FSDPModule)][-1]
            owners.setdefault(owner, []).append(site)
    return owners
