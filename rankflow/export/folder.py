"""Export an adapter from what a run left on disk, without loading its base model."""

import re
import shutil
from pathlib import Path

from safetensors.torch import load_file

from rankflow.errors import ExportError
from rankflow.export.inspect import CONFIG, WEIGHTS, inspect_adapter
from rankflow.export.peft import write_adapter


def export_folder(source: str | Path, output: str | Path) -> Path:
    """Write the adapter of a run, a checkpoint or an adapter folder as a stock PEFT adapter.

    Args:
        source: A run's folder (its ``adapter``, or its newest checkpoint if it did not finish), a
            checkpoint's folder, or an adapter's.
        output: The folder to write.

    Returns:
        The folder.

    Raises:
        ExportError: There is no adapter in ``source``, or the output holds something else.
        RankFlowError: The adapter is damaged.
    """
    adapter = find_adapter(Path(source))
    summary = inspect_adapter(adapter)
    return write_adapter(
        Path(output),
        load_file(adapter / WEIGHTS),
        save_config=lambda folder: shutil.copyfile(adapter / CONFIG, folder / CONFIG),
        ranks=summary.ranks,
        trained=summary.trained_parameters,
        base_model=summary.base_model,
        facts=None,
    )


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
