"""The engine's part of a checkpoint, one safetensors file, and which checkpoint to go on from."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankflow.checkpoint_state import check_state
from rankflow.containment import contained
from rankflow.durable import find_damage
from rankflow.errors import CheckpointError, FileError, brief, excerpt
from rankflow.strict_json import parse_json
from rankflow.tensor_files import TensorFile, check_finite, read_header

CHECKPOINT: Final = "checkpoint-"  # as transformers begins the names of its folders
STATE_FILE = "rankflow_state.safetensors"
SCHEMA = 3

_MOST_VALUES = 10_000_000  # hundreds of events on hundreds of sites
_TENSORS = ("scorer", "sketch", "gated")

_RESUMABLE: Final = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


@dataclass(frozen=True, slots=True)
class Skipped:
    """A checkpoint from which no run can go on, and why."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What a search for a checkpoint found.

    Attributes:
        path: The newest checkpoint that is as it was written; None if there is none.
        skipped: Newer ones that are not.
    """

    path: Path | None
    skipped: tuple[Skipped, ...]


def checkpoint_name(step: int) -> str:
    """Return the name of the folder of a checkpoint, as transformers calls it."""
    return f"{CHECKPOINT}{step}"


def find_checkpoint(folder: str | Path) -> Found:
    """Return the newest checkpoint of a run that is as it was written.

    Args:
        folder: The run's output folder.
    """
    steps = {
        int(path.name.removeprefix(CHECKPOINT)): path
        for path in Path(folder).glob(f"{CHECKPOINT}*")
        if path.is_dir() and path.name.removeprefix(CHECKPOINT).isdecimal()
    }
    skipped: list[Skipped] = []
    for step in sorted(steps, reverse=True):
        reason = _find_fault(steps[step])
        if reason is None:
            return Found(steps[step], tuple(skipped))
        skipped.append(Skipped(steps[step], reason))
    return Found(None, tuple(skipped))


def check_resumable(path: str | Path) -> None:
    """Check that a checkpoint is as it was written, and that a run can go on from it.

    Raises:
        CheckpointError: It is damaged, or lacks something.
    """
    _refuse(path, _find_fault(Path(path)), "resumed from")


def check_whole(path: str | Path) -> None:
    """Check that a checkpoint is as it was written; it may hold the model alone.

    Raises:
        CheckpointError: It is damaged.
    """
    _refuse(path, find_damage(Path(path)), "loaded")


def _refuse(path: str | Path, fault: str | None, purpose: str) -> None:
    if fault is not None:
        raise CheckpointError(f"{path} cannot be {purpose}: {fault}; name another checkpoint")


def _find_fault(path: Path) -> str | None:
    if not path.is_dir():
        return "there is no such folder"
    lacking = [name for name in _RESUMABLE if not (path / name).is_file()]
    return find_damage(path) or (f"{lacking[0]} is missing" if lacking else None)


def save_state(state: dict[str, Any], folder: str | Path) -> Path:
    """Write ``RankFlow.state_dict()`` into a checkpoint's folder, whole or not at all.

    Args:
        state: The engine's state.
        folder: The checkpoint's folder.

    Returns:
        The file written.
    """
    path = Path(folder) / STATE_FILE
    temporary = path.with_name(f".{path.name}.part")
    tensors = {
        f"{part}.{key}": tensor.contiguous().cpu()
        for part in _TENSORS
        for key, tensor in state[part].items()
    }
    values = {"schema": SCHEMA} | {key: v for key, v in state.items() if key not in _TENSORS}
    save_file(tensors, temporary, metadata={"state": json.dumps(values)})
    os.replace(temporary, path)
    return path


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read what ``save_state`` wrote.

    Args:
        folder: A checkpoint's folder.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} holds no {STATE_FILE}, so no run can go on from it; resume from a "
            "checkpoint that RankFlow's trainer or callback wrote"
        )
    try:
        file = read_header(contained(Path(folder), STATE_FILE))
        state = _read_values(file)
        schema = state.pop("schema")
        if schema == SCHEMA:
            check_state(state)
            check_finite(file)
            state |= {part: {} for part in _TENSORS}
            for name, tensor in load_file(path).items():
                part, _, key = name.partition(".")
                state[part][key] = tensor
    except (FileError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({brief(error)}); resume from an older checkpoint"
        ) from error
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r} and this version reads {SCHEMA}; resume with the "
            "version of RankFlow that wrote it"
        )
    return state


def _read_values(file: TensorFile) -> dict[str, Any]:
    """Return the plain values, which stand in the header as JSON."""
    text = file.metadata["state"].encode()
    values = parse_json(text, allow_nan=True, most_values=_MOST_VALUES)
    if not isinstance(values, dict):
        raise ValueError(f"its state is {excerpt(values)} instead of an object")
    return values
