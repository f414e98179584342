"""The engine's part of a checkpoint: one safetensors file beside the adapter and the optimizer."""

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rankflow.errors import CheckpointError

STATE_FILE = "rankflow_state.safetensors"
SCHEMA = 1

_GATED = "gated/"


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
    tensors = state["scorer"] | {_GATED + key: value for key, value in state["gated"].items()}
    stored = {key: tensor.contiguous().cpu() for key, tensor in tensors.items()}
    values = {key: value for key, value in state.items() if key not in ("scorer", "gated")}
    values = {"schema": SCHEMA} | values
    save_file(stored, temporary, metadata={"state": json.dumps(values)})
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
            # The handle has keys() and no iterator.
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); resume from an older checkpoint"
        ) from error
    gated = {key for key in tensors if key.startswith(_GATED)}
    state["scorer"] = {key: tensor for key, tensor in tensors.items() if key not in gated}
    state["gated"] = {key.removeprefix(_GATED): tensors[key] for key in gated}
    if schema != SCHEMA:
        raise CheckpointError(
            f"{path} has schema {schema!r} and this version reads {SCHEMA}; resume with the "
            "version of RankFlow that wrote it"
        )
    return state
