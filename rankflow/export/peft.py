"""Export an adapter so that its consumer computes what the model in memory computes."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankflow.adapters.sites import Site, find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import sync_config
from rankflow.durable import new_folder
from rankflow.errors import ExportError
from rankflow.export.card import AdapterFacts, write_card
from rankflow.export.check import check_adapter, judge_exact
from rankflow.export.formats import find_format
from rankflow.export.inspect import CONFIG, FACTS, WEIGHTS
from rankflow.export.job import ExportJob
from rankflow.export.options import ExportOptions
from rankflow.export.report import REPORT

_MAGNITUDE = "lora_magnitude_vector"

Check = Callable[[Path], None]
"""Raises if a written folder is wrong, before it gets its name."""


def export_adapter(
    model: PeftModel,
    path: str | Path,
    *,
    adapter_name: str = "default",
    facts: AdapterFacts | None = None,
    format: str = "peft",
    options: ExportOptions | None = None,
) -> Path:
    """Write an adapter for other programs, wholly or not at all.

    What was written is loaded by its consumer's own loader and held against the live model before
    it gets its name; ``export_report.json`` tells how far the two are apart. The live model stays
    as it is.

    Args:
        model: The model, steered by RankFlow or not.
        path: The folder to write; an earlier export there is replaced at the end.
        adapter_name: The adapter to export.
        facts: What the run knows of it, for the model card.
        format: One of ``rankflow.export.formats.FORMATS``. By default a stock PEFT folder.
        options: What the format leaves open.

    Returns:
        The folder.

    Raises:
        ExportError: There is nothing to export, a weight is not finite, the folder holds something
            else, the format cannot say what the adapter computes, or what was written is not the
            live adapter.
        SiteError: The model has no such adapter.
    """
    chosen, options = find_format(format), options or ExportOptions()
    options.check(chosen)
    sites = find_sites(model, adapter_name)
    _check_sites(sites, adapter_name)
    check_target(Path(path))
    module, function = chosen.home
    write: Callable[[ExportJob], Path] = getattr(import_module(module), function)
    return write(ExportJob(model, adapter_name, sites, Path(path), chosen, options, facts))


def write_peft(job: ExportJob) -> Path:
    """Write an adapter as a stock PEFT folder, exactly.

    ``rank_pattern`` and ``alpha_pattern`` name every site exactly. A dead site is left out, or
    keeps its magnitude beside one component of zeros; a magnitude that is off is written as the
    norm that it is divided by, or left out where all are off. RankFlow's own facts go into
    ``rankflow.json``, where no loader looks.

    Raises:
        ExportError: What was written does not read back as the live adapter.
    """
    for site in job.sites:
        translate_state_dicts(site.layer, job.adapter_name)
    sync_config(job.model, job.adapter_name, job.sites)
    return write_adapter(
        job.path,
        get_peft_model_state_dict(job.model, adapter_name=job.adapter_name),
        save_config=lambda folder: _save_stock(job.model, job.adapter_name, folder),
        ranks={site.name: site.rank for site in job.sites},
        trained=sum(site.parameters for site in job.sites),
        base_model=job.base_model,
        facts=job.facts,
        tokenizer=job.options.tokenizer,
        check=lambda folder: check_adapter(job, folder, judge_exact(job)),
    )


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    save_config: Callable[[Path], object],
    ranks: Mapping[str, int],
    trained: int | None,
    base_model: str,
    facts: AdapterFacts | None,
    tokenizer: PreTrainedTokenizerBase | None,
    check: Check | None = None,
) -> Path:
    """Write the folder of an adapter and check it, wholly or not at all.

    Args:
        path: The folder to write.
        tensors: The adapter's state dict as PEFT saves it.
        save_config: Writes ``adapter_config.json`` into the folder that it is given.
        ranks: Rank of each site, by site name.
        trained: Parameters of the sites that were trained; None if that is not known.
        base_model: Name or path of the base model; may be empty.
        facts: What the run knows of the adapter.
        tokenizer: Saved beside the adapter, with its chat template; None for none.
        check: Called with the written folder before it gets its name; raises if it is wrong.

    Raises:
        ExportError: A weight is not finite, the folder holds something else, or what was written
            does not read back.
    """
    check_target(path)
    stored = _with_full_names(tensors)
    _check_finite(stored)
    with new_folder(path) as folder:
        save_config(folder)
        save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
        _check_written(folder / WEIGHTS, stored)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        is_dora = any(_MAGNITUDE in key for key in stored)
        size = sum(tensor.numel() for key, tensor in stored.items() if ".lora_" in key)
        card = write_card(
            ranks,
            base_model=base_model,
            is_dora=is_dora,
            trained=size if trained is None else trained,
            stored=size,
            facts=facts,
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        own = {
            "rankflow": version("rankflow"),
            "ranks": dict(ranks),
            "trained_parameters": trained,
            "stored_parameters": size,
            "run": None if facts is None else asdict(facts),
        }
        (folder / FACTS).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")
        if check is not None:
            check(folder)
    return path


def _check_sites(sites: tuple[Site, ...], adapter_name: str) -> None:
    if all(site.rank == 0 and site.magnitude is None for site in sites):
        raise ExportError(
            f"all {len(sites)} sites of adapter {adapter_name!r} have rank 0: it is the base "
            "model, and PEFT cannot load an adapter of nothing"
        )
    merged = [site.name for site in sites if site.layer.merged]
    if merged:
        raise ExportError(
            f"{len(merged)} sites have an adapter merged into their weights, the first is "
            f"{merged[0]!r}; call model.unmerge_adapter() first"
        )


def check_target(path: Path) -> None:
    """Refuse a path at which something else than an export stands.

    Raises:
        ExportError: It is so.
    """
    if path.is_file():
        raise ExportError(f"{path} is a file, and an adapter is a folder; choose another path")
    is_export = (path / CONFIG).is_file() or (path / REPORT).is_file()
    if path.is_dir() and any(path.iterdir()) and not is_export:
        raise ExportError(
            f"{path} exists and holds no adapter, so it is not replaced; choose another folder"
        )


def _with_full_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put back the last part of a magnitude's name, which PEFT drops, and copy the tensors.

    PEFT and diffusers load both names; transformers loads only the full one, and would leave the
    magnitude out with no more than a warning. Copies share no memory, as tied embeddings do, which
    safetensors refuses.
    """
    return {
        f"{key}.weight" if key.endswith(_MAGNITUDE) else key: tensor.detach()
        .cpu()
        .clone(memory_format=torch.contiguous_format)
        for key, tensor in tensors.items()
    }


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
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


def _check_written(file: Path, tensors: Mapping[str, Tensor]) -> None:
    written = load_file(file)
    different = sorted(written.keys() ^ tensors.keys()) or [
        key for key, tensor in tensors.items() if not torch.equal(written[key], tensor)
    ]
    if different:
        raise ExportError(
            f"what was written differs from the model in {different[0]!r}; the disk or the file "
            "system is at fault: export again, elsewhere"
        )
