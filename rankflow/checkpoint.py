"""The engine's part of a checkpoint: one safetensors file beside the adapter and the optimizer."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rankflow.checkpoint_state import check_state
from rankflow.containment import contained
from rankflow.errors import CheckpointError, FileError, brief, excerpt
from rankflow.strict_json import parse_json
from rankflow.tensor_files import TensorFile, check_finite, read_header

STATE_FILE = "rankflow_state.safetensors"
SCHEMA = 2

_MOST_VALUES = 10_000_000  # hundreds of events on hundreds of sites
_TENSORS = ("scorer", "sketch", "gated")


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
