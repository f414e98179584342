"""The engine's part of a checkpoint: one safetensors file beside the adapter and the optimizer."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankflow.errors import CheckpointError

STATE_FILE = "rankflow_state.safetensors"
SCHEMA = 3

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
        with safe_open(path, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            schema = state.pop("schema")
            state |= {part: {} for part in _TENSORS}
            for name in file.keys():  # noqa: SIM118 - the handle has keys() and no iterator
                part, _, key = name.partition(".")
                state[part][key] = file.get_tensor(name)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); resume from an older checkpoint"
        ) from error
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r} and this version reads {SCHEMA}; resume with the "
            "version of RankFlow that wrote it"
        )
    return state
