"""Export an adapter from what a run left on disk."""

import re
import shutil
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

from rankflow.errors import ExportError
from rankflow.export.fit import check_ranks
from rankflow.export.formats import find_format
from rankflow.export.inspect import CONFIG, WEIGHTS, AdapterSummary, inspect_adapter
from rankflow.export.loading import load_adapted
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.export.report import ExportReport, measure_files, write_report
from rankflow.export.tensors import load_tensors
from rankflow.export.tokenizer import TOKENIZER, find_tokenizer
from rankflow.export.write import About, peft_layout, write_adapter
from rankflow.quiet import quiet_libraries


def export_folder(
    source: str | Path,
    output: str | Path,
    *,
    format: str = "peft",
    base_model: str | None = None,
    options: ExportOptions | None = None,
) -> Path:
    """Write the adapter of a run, a checkpoint or an adapter folder for other programs.

    The stock PEFT format needs no base model: its tensors are compared bit by bit. With
    ``base_model``, and for every other format, the base is loaded and outputs are compared.

    Args:
        source: A run's folder (its ``adapter``, or its newest checkpoint if it did not finish), a
            checkpoint's folder, or an adapter's.
        output: The folder to write.
        format: One of ``rankflow.export.formats.FORMATS``.
        base_model: A folder or hub id; by default the one that the adapter names.
        options: What the format leaves open.

    Returns:
        The folder.

    Raises:
        ExportError: There is no adapter in ``source``, the output holds something else, the base
            model cannot be loaded, or the format cannot say what the adapter computes.
        RankFlowError: The adapter is damaged, or its tensors are not of its configuration's ranks.
    """
    chosen, options = find_format(format), options or ExportOptions()
    options.check(chosen)
    adapter = find_adapter(Path(source))
    summary = inspect_adapter(adapter)
    if options.tokenizer is None and "tokenizer" in chosen.options:
        options = replace(options, tokenizer=find_tokenizer(adapter))
    if format == "peft" and base_model is None:
        return _copy(adapter, summary, Path(output), options)
    with quiet_libraries():
        model = load_adapted(adapter, base_model)
        return export_adapter(model, output, format=format, options=options)


def _copy(adapter: Path, summary: AdapterSummary, output: Path, options: ExportOptions) -> Path:
    """Write an adapter again without its base model."""
    check_ranks(adapter, summary)
    return write_adapter(
        output,
        load_tensors(adapter),
        layout=peft_layout(lambda folder: shutil.copyfile(adapter / CONFIG, folder / CONFIG)),
        about=About(
            ranks=summary.ranks,
            trained=summary.trained_parameters,
            base_model=summary.base_model,
            facts=None,
            classes=summary.classes,
            tokenizer=options.tokenizer,
        ),
        check=lambda folder: _report_copy(folder, summary),
    )


def _report_copy(folder: Path, summary: AdapterSummary) -> None:
    parameters, size = measure_files(folder)
    chosen = find_format("peft")
    report = ExportReport(
        format=chosen.name,
        rankflow=version("rankflow"),
        loads_in=chosen.loads_in,
        fails_in=chosen.fails_in,
        checked_by="safetensors, every tensor bit by bit",
        parameters=parameters,
        bytes=size,
        largest_rank=max(summary.ranks.values()),
        not_probed="the base model was not loaded; name it with --base",
        tokenizer=(folder / TOKENIZER).is_file(),
    )
    write_report(folder, report)


def find_adapter(source: Path) -> Path:
    """Return the folder of the adapter that a run, a checkpoint or an adapter folder holds.

    Raises:
        ExportError: There is none.
    """
    candidates = [source, source / "adapter", *_newest_first(source)]
    for folder in candidates:
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise ExportError(
        f"{source} holds no adapter ({CONFIG} and {WEIGHTS}), no finished run and no checkpoint; "
        "name the folder of one of them"
    )


def _newest_first(run: Path) -> list[Path]:
    numbered = {
        int(match[1]): folder
        for folder in run.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    return [numbered[step] for step in sorted(numbered, reverse=True)]
