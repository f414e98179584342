"""Where ``rankflow train --resume`` goes on."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from rich.console import Console

from rankflow.checkpoint import find_checkpoint
from rankflow.errors import CheckpointError, brief, excerpt
from rankflow.specs.run import RunSpec
from rankflow.strict_json import parse_json
from rankflow.training.result import RunResult
from rankflow.training.run_folder import METRICS_FILE, SPEC_FILE

_RESULT = TypeAdapter(RunResult)


def find_start(folder: Path, spec: RunSpec, console: Console) -> Path | None:
    """Return the newest checkpoint of a run that is as it was written, and tell which it skips.

    Args:
        folder: The run's folder.
        spec: The run as it is asked for now.
        console: Where to tell.

    Returns:
        The checkpoint; None if none was written yet, so that the run begins.

    Raises:
        CheckpointError: The run was begun with another spec, or all of its checkpoints are damaged.
    """
    if (folder / SPEC_FILE).is_file():
        _check_spec(folder / SPEC_FILE, spec)
    found = find_checkpoint(folder)
    for skipped in found.skipped:
        console.print(f"skipped     {skipped.path}: {skipped.reason}", soft_wrap=True)
    if found.path is not None:
        console.print(f"resume      {found.path}", highlight=False, soft_wrap=True)
    elif found.skipped:
        raise CheckpointError(
            f"no checkpoint in {folder} is as it was written; without --resume the run begins "
            "anew, and this folder is moved aside"
        )
    else:
        console.print("resume      nothing is saved yet: the run begins", highlight=False)
    return found.path


def read_result(folder: Path) -> RunResult | None:
    """Return the result of a run that has ended; None if it has not.

    Raises:
        CheckpointError: It cannot be read.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return None
    try:
        return _RESULT.validate_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({brief(error)}); remove it, and resume again"
        ) from error


def _check_spec(path: Path, spec: RunSpec) -> None:
    try:
        before = parse_json(path.read_bytes())
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged ({brief(error)}); restore it, or begin anew without --resume"
        ) from error
    changes = list(_changes(before, spec.model_dump(mode="json"), ""))
    if changes:
        raise CheckpointError(
            f"{path.parent} holds a run with other settings: {'; '.join(changes[:5])}; resume with "
            "the spec and the overrides that it was begun with, or leave --resume out to begin anew"
        )


def _changes(before: Any, now: Any, key: str) -> Iterator[str]:
    """Tell what differs, table by table; which checkpoint to resume from does not matter."""
    if key == "train.resume_from_checkpoint" or before == now:
        return
    if isinstance(before, dict) and isinstance(now, dict):
        for inner in sorted(before.keys() | now.keys()):
            dotted = f"{key}.{inner}" if key else inner
            yield from _changes(before.get(inner), now.get(inner), dotted)
    else:
        yield f"{key} was {excerpt(before)} and is {excerpt(now)}"
