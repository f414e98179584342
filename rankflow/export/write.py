"""Write the folder of an adapter, wholly or not at all."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankflow.durable import new_folder
from rankflow.errors import ExportError
from rankflow.export.card import AdapterFacts, write_card
from rankflow.export.inspect import CONFIG, FACTS, WEIGHTS
from rankflow.export.report import REPORT

_MAGNITUDE = "lora_magnitude_vector"

Check = Callable[[Path], None]
"""Raises if a written folder is wrong, before it gets its name."""


@dataclass(frozen=True, slots=True)
class Layout:
    """How a library wants the folder of an adapter.

    Attributes:
        library: Its name, as model hubs know it.
        loading: Python that loads the folder.
        weights: Name of the file with the tensors.
        header: What the header of that file tells the library.
        save_config: Writes what else the library needs into the folder that it is given.
    """

    library: str
    loading: str
    weights: str
    header: Mapping[str, str]
    save_config: Callable[[Path], object]


def peft_layout(save_config: Callable[[Path], object]) -> Layout:
    """Return the layout of PEFT.

    Args:
        save_config: Writes ``adapter_config.json`` into the folder that it is given.
    """
    loading = (
        "from peft import PeftModel\n\n"
        "# base: the model that was adapted\n"
        'model = PeftModel.from_pretrained(base, "path/to/this/folder")'
    )
    return Layout("peft", loading, WEIGHTS, {}, save_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """What is told of an adapter, and put beside its tensors.

    Attributes:
        ranks: Rank of each site, by site name.
        trained: Parameters of the sites that were trained; None if that is not known.
        base_model: Name or path of the base model; may be empty.
        facts: What the run knows of the adapter.
        classes: What the configuration of a classifier says of its classes.
        tokenizer: Saved with its chat template; None for none.
    """

    ranks: Mapping[str, int]
    trained: int | None
    base_model: str
    facts: AdapterFacts | None
    classes: Mapping[str, Any] | None
    tokenizer: PreTrainedTokenizerBase | None


def write_adapter(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    layout: Layout,
    about: About,
    check: Check | None = None,
) -> Path:
    """Write the folder of an adapter and check it, wholly or not at all.

    Args:
        path: The folder to write.
        tensors: The adapter's state dict, by the keys of its library.
        layout: How that library wants the folder.
        about: What is told of it.
        check: Called with the written folder before it gets its name; raises if it is wrong.

    Raises:
        ExportError: A weight is not finite, the folder holds something else, or what was written
            does not read back.
    """
    check_target(path)
    stored = _with_full_names(tensors)
    _check_finite(stored)
    with new_folder(path) as folder:
        layout.save_config(folder)
        save_file(stored, folder / layout.weights, metadata={"format": "pt", **layout.header})
        _check_written(folder / layout.weights, stored)
        if about.tokenizer is not None:
            about.tokenizer.save_pretrained(folder)
        _tell(folder, stored, layout, about)
        if check is not None:
            check(folder)
    return path


def _tell(folder: Path, stored: Mapping[str, Tensor], layout: Layout, about: About) -> None:
    """Write the model card and RankFlow's own facts."""
    size = sum(tensor.numel() for key, tensor in stored.items() if ".lora_" in key)
    card = write_card(
        about.ranks,
        library=layout.library,
        loading=layout.loading,
        base_model=about.base_model,
        is_dora=any(_MAGNITUDE in key for key in stored),
        trained=size if about.trained is None else about.trained,
        stored=size,
        facts=about.facts,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    own = {
        "rankflow": version("rankflow"),
        "ranks": dict(about.ranks),
        "trained_parameters": about.trained,
        "stored_parameters": size,
        "classes": about.classes,
        "run": None if about.facts is None else asdict(about.facts),
    }
    (folder / FACTS).write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


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
