"""Whether a saved adapter fits its own configuration, and the base model that it is put on.

PEFT first changes the model: it makes factors of the ranks that the configuration announces,
however large, and then finds that those in the file are of other shapes, or are not there.
"""

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankflow.errors import ExportError, excerpt
from rankflow.export.adapter_files import CONFIG, check_adapter_files, read_weights
from rankflow.export.inspect import AdapterSummary, inspect_adapter

_PREFIX: Final = "base_model.model."
# The keys that tell PEFT which modules to adapt.
_SELECTING: Final = (
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "modules_to_save",
    "target_modules",
    "target_parameters",
)


def check_ranks(folder: Path, summary: AdapterSummary) -> None:
    """Check that every site has the rank that the configuration announces.

    Raises:
        ExportError: PEFT could not load the adapter.
    """
    for site in summary.sites:
        if site.rank not in (0, site.config_rank):
            raise ExportError(
                f"site {site.name!r} has factors of rank {site.rank} in {folder}, and rank "
                f"{site.config_rank} in its {CONFIG}; PEFT could not load it: save or copy the "
                "adapter again"
            )


def check_fit(folder: Path, base: nn.Module, *, with_heads: bool = True) -> None:
    """Check an adapter's files, and that they fit a base model, before PEFT changes the model.

    Args:
        folder: The adapter's folder.
        base: The model.
        with_heads: Whether what is saved beside the sites is to be loaded too, and must fit.

    Raises:
        RankFlowError: They are damaged, ask for what no file may, or do not fit.
    """
    config = check_adapter_files(folder)
    summary = inspect_adapter(folder)
    check_ranks(folder, summary)
    _check_keys(folder, config)
    modules = dict(base.named_modules())
    for site in summary.sites:
        if with_heads and site.name not in modules and not config.get("target_parameters"):
            raise ExportError(
                f"{folder} adapts {site.name!r}, and {type(base).__name__} has no such module; "
                "name the model that it was trained on"
            )
    _check_shapes(folder, base, modules, with_heads)
    _check_targets(folder, config, modules, {name for name, rank in summary.ranks.items() if rank})


def _check_keys(folder: Path, config: Mapping[str, Any]) -> None:
    known = {field.name for field in fields(LoraConfig)} | {"peft_version", "runtime_config"}
    for key, value in config.items():
        if key not in known and value:
            raise ExportError(
                f"{folder / CONFIG} has {key} = {excerpt(value)}, which this version of PEFT does "
                "not know and would ignore; load it by the version that wrote it"
            )
    if config.get("layer_replication"):
        raise ExportError(
            f"{folder / CONFIG} has layer_replication = {excerpt(config['layer_replication'])}, "
            "which copies layers of the base model; load such an adapter by PEFT itself"
        )


def _check_shapes(
    folder: Path, base: nn.Module, modules: Mapping[str, nn.Module], with_heads: bool
) -> None:
    state = base.state_dict() if with_heads else {}
    whole = {key: tuple(tensor.shape) for key, tensor in state.items()}
    for key, tensor in read_weights(folder).tensors.items():
        name = key.removeprefix(_PREFIX)
        wanted = whole.get(name)
        site, _, part = name.partition(".lora_")
        if part:
            wanted = _shape_of(part.split(".")[0], tensor.shape, modules.get(site))
        if wanted is not None and tensor.shape != wanted:
            raise ExportError(
                f"{key} has the shape {tensor.shape}, and {wanted} fits {type(base).__name__}; "
                "name the model that the adapter was trained on"
            )


def _shape_of(
    part: str, shape: tuple[int, ...], module: nn.Module | None
) -> tuple[int, ...] | None:
    """Return the shape that a factor or a magnitude of a layer must have; None if any will do."""
    width = _widths(module)
    if width is None:
        return None
    inputs, outputs = width
    return {
        "A": (shape[0], inputs),
        "B": (outputs, shape[-1]),
        "embedding_A": (shape[0], inputs),
        "embedding_B": (outputs, shape[-1]),
        "magnitude_vector": (outputs,),
    }.get(part)


def _widths(module: nn.Module | None) -> tuple[int, int] | None:
    """Return how many inputs and outputs a layer has, where its factors are two matrices."""
    if isinstance(module, nn.Linear):  # quantised ones too
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def _check_targets(
    folder: Path, config: Mapping[str, Any], modules: Mapping[str, nn.Module], sites: set[str]
) -> None:
    """Check that PEFT makes no factors that the file lacks, of any size and at random."""
    targets = config.get("target_modules")
    if targets == "all-linear":
        raise ExportError(
            f"{folder / CONFIG} has target_modules 'all-linear', where PEFT saves names; write "
            "those of its sites"
        )
    if targets is None:
        return
    try:
        parsed = LoraConfig(**{key: config.get(key) for key in _SELECTING})
        for name, module in modules.items():
            adaptable = _widths(module) is not None and name not in sites
            if adaptable and check_target_module_exists(parsed, name):
                raise ExportError(
                    f"{folder / CONFIG} has target_modules = {excerpt(targets)}, which takes in "
                    f"{name!r}, and no factor of it is saved; save or copy the adapter again"
                )
    except (ValueError, re.error) as error:
        raise ExportError(f"{folder / CONFIG} does not say what it adapts: {error}") from error
