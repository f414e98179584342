"""Export an adapter so that its consumer computes what the model in memory computes."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from rankflow.adapters.sites import Site, find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import sync_config
from rankflow.errors import ExportError
from rankflow.export.card import AdapterFacts
from rankflow.export.check import check_adapter, judge_exact
from rankflow.export.formats import find_format
from rankflow.export.job import ExportJob, refuse_nothing
from rankflow.export.options import ExportOptions
from rankflow.export.sharded import write_sharded
from rankflow.export.write import check_target, peft_layout, write_adapter
from rankflow.resizing.sharding import is_sharded


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

    Under FSDP2 all processes have to call it, and the first one writes.

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
    if is_sharded(model):
        return write_sharded(
            ExportJob(model, adapter_name, sites, Path(path), chosen, options, facts)
        )
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
    return write_adapter(
        job.path,
        stock_state(job),
        layout=peft_layout(lambda folder: _save_stock(job.model, job.adapter_name, folder)),
        about=job.about,
        check=lambda folder: check_adapter(job, folder, judge_exact(job)),
    )


def stock_state(job: ExportJob) -> dict[str, Tensor]:
    """Return the adapter's state dict as stock PEFT loads it, the live config in step with it."""
    for site in job.sites:
        translate_state_dicts(site.layer, job.adapter_name)
    sync_config(job.model, job.adapter_name, job.sites)
    state: dict[str, Tensor] = get_peft_model_state_dict(job.model, adapter_name=job.adapter_name)
    return state


def _check_sites(sites: tuple[Site, ...], adapter_name: str) -> None:
    refuse_nothing(sites, adapter_name)
    merged = [site.name for site in sites if site.layer.merged]
    if merged:
        raise ExportError(
            f"{len(merged)} sites have an adapter merged into their weights, the first is "
            f"{merged[0]!r}; call model.unmerge_adapter() first"
        )


def _save_stock(model: PeftModel, adapter_name: str, folder: Path) -> None:
    """Let PEFT write; it puts every adapter but ``default`` into a folder of its own."""
    model.save_pretrained(folder, selected_adapters=[adapter_name])
    nested = folder / adapter_name
    if nested.is_dir():
        for file in nested.iterdir():
            file.replace(folder / file.name)
        nested.rmdir()
