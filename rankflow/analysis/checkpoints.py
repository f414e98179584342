"""Find what a run left on disk: its checkpoints in order, and what it ended with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rankflow.errors import RankFlowError
from rankflow.export.inspect import CONFIG, WEIGHTS

Content = Literal["adapter", "model"]

_ADAPTER_WEIGHTS = (WEIGHTS, "adapter_model.bin")
_MODEL_CONFIG = "config.json"
_MODEL_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_NUMBERED = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Fine-tuned weights of one moment.

    Attributes:
        folder: Where they are.
        content: Whether they are an adapter or a whole model.
        step: Optimizer steps taken; None for the end of a run, whose folder does not tell.
    """

    folder: Path
    content: Content
    step: int | None

    @property
    def label(self) -> str:
        """The moment, for people."""
        return "end" if self.step is None else f"step {self.step:,}"


def find_checkpoints(folder: Path) -> tuple[Checkpoint, ...]:
    """Return the checkpoints of a run by their steps, then what it ended with.

    Args:
        folder: An adapter, a model, a Trainer's ``checkpoint-100``, or a run that holds several of
            these, and perhaps the final adapter or model, in itself or in ``adapter``.

    Raises:
        RankFlowError: There is none.
    """
    numbered = [_read(path) for path in folder.glob("checkpoint-*") if _step_of(path) is not None]
    found = sorted(
        (checkpoint for checkpoint in numbered if checkpoint is not None),
        key=lambda checkpoint: checkpoint.step or 0,
    )
    last = _read(folder) or _read(folder / "adapter")
    if last is not None:
        found.append(last)
    if not found:
        raise RankFlowError(
            f"{folder} holds no weights: neither an adapter ({CONFIG} and {WEIGHTS}), nor a model "
            f"({_MODEL_CONFIG} and {_MODEL_WEIGHTS[0]}), nor checkpoint-* folders of one of them; "
            "name the folder of a run, a checkpoint, an adapter or a model"
        )
    return tuple(found)


def name_runs(folders: Sequence[Path]) -> list[str]:
    """Return the shortest endings of the folders' paths that tell them apart.

    >>> name_runs([Path("runs/a/dora"), Path("runs/a/lora")])
    ['dora', 'lora']
    >>> name_runs([Path("dora/checkpoint-9"), Path("lora/checkpoint-9"), Path("lora/adapter")])
    ['dora/checkpoint-9', 'lora/checkpoint-9', 'lora/adapter']
    """
    paths = [folder.resolve().parts for folder in folders]
    longest = max(len(path) for path in paths)
    for length in range(1, longest + 1):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(set(paths)) and not any(map(_says_nothing, names)):
            return names
    return ["/".join(path) for path in paths]


def _says_nothing(name: str) -> bool:
    return name == "adapter" or _NUMBERED.fullmatch(name) is not None


def _read(folder: Path) -> Checkpoint | None:
    """Return what a folder holds by itself."""
    if (folder / CONFIG).is_file() and _has_any(folder, _ADAPTER_WEIGHTS):
        return Checkpoint(folder, "adapter", _step_of(folder))
    if (folder / _MODEL_CONFIG).is_file() and _has_any(folder, _MODEL_WEIGHTS):
        return Checkpoint(folder, "model", _step_of(folder))
    return None


def _has_any(folder: Path, names: tuple[str, ...]) -> bool:
    return any((folder / name).is_file() for name in names)


def _step_of(folder: Path) -> int | None:
    match = _NUMBERED.fullmatch(folder.resolve().name)
    return None if match is None else int(match[1])
