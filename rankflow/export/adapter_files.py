"""The files of a saved adapter, checked before anything is made of them.

PEFT imports modules that ``adapter_config.json`` names (``megatron_core``; ``auto_mapping`` in its
``Auto`` classes, which RankFlow never calls), makes tensors of the ranks that it announces before
it looks at those in the file, and reads the pickle ``adapter_model.bin`` where there is no
safetensors file. None of it happens to a folder that passes here.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rankflow.containment import contained
from rankflow.durable import SUMS_FILE, find_damage
from rankflow.errors import FileError, RankFlowError, excerpt
from rankflow.strict_json import read_json
from rankflow.tensor_files import TensorFile, check_finite, read_header

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"

_PICKLE: Final = "adapter_model.bin"
_FILE_KEYS: Final = ("cache_file", "covariance_file")  # of starts that torch.load reads
_NAMES: Final = ("exclude_modules", "layers_pattern", "modules_to_save", "target_modules")
_LARGEST_RANK: Final = 2**20
_LARGEST_ALPHA: Final = 1e30


def read_config(folder: Path) -> dict[str, Any]:
    """Return what ``adapter_config.json`` says, for an adapter of any type of PEFT's.

    Raises:
        FileError: It is damaged, or asks for code or for files from elsewhere.
    """
    path = contained(folder, CONFIG)
    config = read_json(path)
    if not isinstance(config, dict):
        raise FileError(
            f"{path} has peft_type None; only LORA (LoRA, DoRA) can be read; name another adapter"
        )
    if config.get("megatron_config"):
        raise FileError(
            f"{path} has megatron_config, for which PEFT imports the module "
            f"{excerpt(config.get('megatron_core'))}; RankFlow imports nothing that a file names: "
            "remove both keys, if the base is no model of Megatron"
        )
    _check_file_keys(path, config)
    base = config.get("base_model_name_or_path")
    if not (base is None or (isinstance(base, str) and base.isprintable())):
        raise FileError(
            f"{path} has base_model_name_or_path = {excerpt(base)}; write a hub id or a folder"
        )
    if config.get("peft_type") == "LORA":
        _check_lora(path, config)
    return config


def read_lora_config(folder: Path) -> dict[str, Any]:
    """Return what ``adapter_config.json`` says of a LoRA or DoRA adapter.

    Raises:
        RankFlowError: It is damaged, of another type, or asks for code or files from elsewhere.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise RankFlowError(
            f"{folder / CONFIG} has peft_type {kind!r}; only LORA (LoRA, DoRA) can be read; "
            "name another adapter"
        )
    return config


def read_weights(folder: Path) -> TensorFile:
    """Return the checked header of ``adapter_model.safetensors``; no tensor is read.

    Raises:
        FileError: It is missing or damaged.
    """
    path = contained(folder, WEIGHTS)
    if not path.exists() and (folder / _PICKLE).exists():
        raise FileError(
            f"{path} cannot be read: No such file, and {_PICKLE} is a pickle, which may run code; "
            "ask for safetensors, or convert it where you trust its author"
        )
    return read_header(path)


def check_adapter_files(folder: Path) -> dict[str, Any]:
    """Check all that PEFT reads of a folder, every number of its tensors too.

    A flipped bit that leaves a finite number shows only where RankFlow wrote the folder and its
    sums.

    Returns:
        What its configuration says.

    Raises:
        RankFlowError: The folder cannot be read safely.
    """
    config = read_config(folder)
    check_finite(read_weights(folder))
    damage = find_damage(folder, only=WEIGHTS) if (folder / SUMS_FILE).is_file() else None
    if damage is not None:
        raise FileError(
            f"{folder}: {damage}; export it again, or remove {SUMS_FILE} if you changed it yourself"
        )
    return config


def _check_file_keys(path: Path, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key in _FILE_KEYS and value is not None:
            raise FileError(
                f"{path} has {key} = {excerpt(value)}, a file for a start that is over; remove it"
            )
        if isinstance(value, dict):
            _check_file_keys(path, value)


def _check_lora(path: Path, config: Mapping[str, Any]) -> None:
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise RankFlowError(f"{path} lacks the key {key!r}; was it saved by PEFT?")
    ranks = {"r": config["r"]} | _pattern(path, config, "rank_pattern")
    alphas = {"lora_alpha": config["lora_alpha"]} | _pattern(path, config, "alpha_pattern")
    for key, rank in ranks.items():
        if type(rank) is not int or not 0 <= rank <= _LARGEST_RANK:
            raise FileError(f"{path} has the rank {excerpt(rank)} for {excerpt(key)}; mend it")
    for key, alpha in alphas.items():
        if type(alpha) not in (int, float) or not abs(alpha) < _LARGEST_ALPHA:
            raise FileError(f"{path} has the alpha {excerpt(alpha)} for {excerpt(key)}; mend it")
    for key in _NAMES:
        value = config.get(key)
        names = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(name, str) for name in names):
            raise FileError(f"{path} has {key} = {excerpt(value)}; write names of modules")
    layers = config.get("layers_to_transform")
    numbers = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(number) is int for number in numbers):
        raise FileError(f"{path} has layers_to_transform = {excerpt(layers)}; write whole numbers")
    for key in ("use_dora", "use_rslora"):
        if type(config.get(key, False)) is not bool:
            raise FileError(f"{path} has {key} = {excerpt(config[key])}; write true or false")


def _pattern(path: Path, config: Mapping[str, Any], key: str) -> dict[str, Any]:
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise FileError(f"{path} has {key} = {excerpt(patterns)}; write names and numbers")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise FileError(
                f"{path} has the pattern {excerpt(pattern)} in {key}: {error}; mend it"
            ) from error
    return patterns
