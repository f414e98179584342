"""Export an adapter that stock PEFT loads, with the outputs of the model in memory."""

import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor

from rankflow.adapters.dead import translate_state_dicts
from rankflow.adapters.sites import Site, find_sites
from rankflow.adapters.stock import sync_config
from rankflow.durable import new_folder
from rankflow.errors import ExportError
from rankflow.export.card import AdapterFacts, write_card

FACTS_FILE = "rankflow.json"
WEIGHTS_FILE = "adapter_model.safetensors"


def export_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    adapter_name: str = "default",
    facts: AdapterFacts | None = None,
) -> Path:
    """Write an adapter as a stock PEFT folder, wholly or not at all.

    ``rank_pattern`` and ``alpha_pattern`` name every site exactly. A dead LoRA site is left out; a
    dead DoRA site keeps its magnitude, beside one component of zeros. RankFlow's own facts go into
    ``rankflow.json``, where no loader looks.

    Args:
        model: The model, steered by RankFlow or not.
        path: The folder to write; an earlier export there is replaced at the end.
        adapter_name: The adapter to export.
        facts: What the run knows of it, for the model card.

    Returns:
        The folder.

    Raises:
        ExportError: There is nothing to export, a weight is not finite, the folder holds something
            else, or what was written does not read back.
        SiteError: The model has no such adapter.
    """
    path = Path(path)
    sites = find_sites(model, adapter_name)
    _check_target(path)
    _check_sites(sites, adapter_name)
    for site in sites:
        translate_state_dicts(site.layer, adapter_name)
    sync_config(model, adapter_name, sites)
    tensors = _tensors(model, adapter_name)
    _check_finite(tensors)
    with new_folder(path) as folder:
        _save_stock(model, adapter_name, folder)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        _check_written(folder / WEIGHTS_FILE, tensors)
        _write_own_files(model, adapter_name, sites, facts, folder)
    return path


def _check_target(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / "adapter_config.json").is_file():
        raise ExportError(
            f"{path} exists and holds no adapter, so it is not replaced; choose another folder"
        )
    if path.is_file():
        raise ExportError(f"{path} is a file, and an adapter is a folder; choose another path")


def _check_sites(sites: tuple[Site, ...], adapter_name: str) -> None:
    if all(site.rank == 0 and site.magnitude is None for site in sites):
        raise ExportError(
            f"all {len(sites)} sites of adapter {adapter_name!r} have rank 0: it is the base "
            "model, and PEFT cannot load an adapter of nothing"
        )


def _tensors(model: PeftModel, adapter_name: str) -> dict[str, Tensor]:
    """Return the adapter by its stored names.

    PEFT drops the last part of a magnitude's name. With it PEFT and diffusers load the same, and
    transformers loads the magnitude too, which it otherwise leaves out.
    """
    stored = get_peft_model_state_dict(model, adapter_name=adapter_name)
    return {
        f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: tensor.detach()
        .contiguous()
        .cpu()
        for key, tensor in stored.items()
    }


def _check_finite(tensors: dict[str, Tensor]) -> None:
    broken = [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ExportError(
            f"{len(broken)} tensors are not finite, the first is {broken[0]}; the training "
            "diverged: export an earlier checkpoint, or lower the learning rate"
        )


def _save_stock(model: PeftModel, adapter_name: str, folder: Path) -> None:
    """Let PEFT write; it puts every adapter but ``default`` into a folder of its own."""
    model.save_pretrained(folder, selected_adapters=[adapter_name])
    nested = folder / adapter_name
    if nested.is_dir():
        for file in nested.iterdir():
            file.replace(folder / file.name)
        nested.rmdir()


def _check_written(file: Path, tensors: dict[str, Tensor]) -> None:
    written = load_file(file)
    if written.keys() != tensors.keys():
        different = sorted(written.keys() ^ tensors.keys())
        raise ExportError(f"the file written differs from the model in {different[0]!r}")
    for key, tensor in tensors.items():
        if not torch.equal(written[key], tensor):
            raise ExportError(f"the file written differs from the model in {key!r}")


def _write_own_files(
    model: PeftModel,
    adapter_name: str,
    sites: tuple[Site, ...],
    facts: AdapterFacts | None,
    folder: Path,
) -> None:
    ranks = {site.name: site.rank for site in sites}
    card = write_card(
        ranks,
        base_model=model.peft_config[adapter_name].base_model_name_or_path or "",
        is_dora=any(site.magnitude is not None for site in sites),
        facts=facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    own = {
        "rankflow": version("rankflow"),
        "ranks": ranks,
        "trained_parameters": sum(site.parameters for site in sites),
        "run": None if facts is None else asdict(facts),
    }
    (folder / FACTS_FILE).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
