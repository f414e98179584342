"""A folder with a base model, looked at before a library loads it.

transformers and diffusers read what lies in it: a list of shards that may name files anywhere, a
pickle where there is no safetensors file, an attention that is fetched as compiled code.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from rankflow.containment import contained
from rankflow.errors import FileError, excerpt
from rankflow.strict_json import read_json
from rankflow.tensor_files import read_header

_CONFIGS: Final = ("config.json", "generation_config.json", "tokenizer_config.json")
_READ: Final = (".jinja", ".json", ".model", ".safetensors", ".txt")
_PICKLES: Final = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.bin.index.json")
_ATTENTION: Final = ("attn_implementation", "_attn_implementation", "experts_implementation")

# What transformers is told whenever it loads weights.
SAFE: Final[dict[str, Any]] = {"trust_remote_code": False, "use_safetensors": True}


def check_model(source: str | Path) -> None:
    """Check the folder of a model; a hub id is left to the hub's own client.

    The configuration must be strict JSON that asks for no kernel from elsewhere, every file must
    lie in the folder, and every safetensors file must be whole. No tensor is read.

    Args:
        source: A folder, or a hub id.

    Raises:
        FileError: It is not so.
    """
    folder = Path(source)
    if not folder.is_dir():
        return
    for file in folder.iterdir():
        if file.suffix in _READ:
            contained(folder, file.name)
    for name in _CONFIGS:
        if (folder / name).is_file():
            _check_attention(folder / name, read_json(folder / name))
    shards = [name for index in folder.glob("*.safetensors.index.json") for name in _named(index)]
    for name in shards:
        if not name.endswith(".safetensors"):
            raise FileError(f"{folder} names {excerpt(name)} as a shard; only safetensors are read")
    found = {path.name for path in folder.glob("*.safetensors")}
    for name in sorted(found.union(shards)):
        read_header(contained(folder, name))
    if (folder / "config.json").is_file() and not found.union(shards):
        _refuse_pickles(folder)


def _named(index: Path) -> Iterator[str]:
    values = read_json(index)
    shards = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise FileError(f"{index} has no weight_map of file names; save or copy the model again")
    yield from set(shards.values())


def _check_attention(path: Path, values: Any) -> None:
    """Refuse kernels by name: transformers would fetch and run them."""
    if isinstance(values, list):
        for value in values:
            _check_attention(path, value)
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        if key in _ATTENTION and "/" in str(value):
            raise FileError(
                f"{path} asks for {key} = {excerpt(value)}, compiled code from elsewhere; remove "
                "the key"
            )
        _check_attention(path, value)


def _refuse_pickles(folder: Path) -> None:
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    pickles = [name for name in pickles if name != "training_args.bin"]
    if pickles:
        raise FileError(
            f"{folder} holds {pickles[0]} and no safetensors file; a pickle may run code when it "
            "is read, so RankFlow reads safetensors only: ask for such a file, or convert it where "
            "you trust its author"
        )
