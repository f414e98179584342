"""What an adapter folder holds, told from its configuration and the header of its weights.

No tensor is read and torch is not imported, so that looking at an adapter of any size is instant.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rankflow.containment import contained
from rankflow.errors import FileError, RankFlowError, excerpt
from rankflow.export.adapter_files import CONFIG as CONFIG
from rankflow.export.adapter_files import WEIGHTS as WEIGHTS
from rankflow.export.adapter_files import read_lora_config, read_weights
from rankflow.specs.budget import match_pattern
from rankflow.strict_json import read_json
from rankflow.tensor_files import TensorFile

FACTS: Final = "rankflow.json"

Shapes = dict[str, tuple[int, ...]]

_TENSOR: Final = re.compile(
    r"(?:base_model\.model\.)?(?P<site>.+)\.lora_(?P<part>(?:embedding_)?[AB]|magnitude_vector)"
    r"(?:\.(?:weight|bias))?"
)


@dataclass(frozen=True, slots=True)
class SiteSummary:
    """One site of a saved adapter.

    Attributes:
        name: Module path from the base model's root.
        rank: Components, counted in the tensors.
        config_rank: Components that the configuration announces; PEFT loads only equal ones.
        alpha: LoRA's alpha.
        has_magnitude: Whether a DoRA magnitude is saved.
        parameters: Parameters of the site's tensors.
        rank_stabilised: Whether the scale is ``alpha / sqrt(rank)`` instead of ``alpha / rank``.
    """

    name: str
    rank: int
    config_rank: int
    alpha: float
    has_magnitude: bool
    parameters: int
    rank_stabilised: bool

    @property
    def scale(self) -> float:
        """Factor of ``B A`` in the adapted weight; 0 where there is no component."""
        if self.rank == 0:
            return 0.0
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """A saved adapter.

    Attributes:
        base_model: What the adapter was trained on; empty where it does not say.
        sites: Its sites, layers in counting order.
        other_parameters: Parameters saved beside the sites, such as a task head.
        trained_parameters: Parameters of all sites that were trained; None where no
            ``rankflow.json`` tells. Stock PEFT may need more: zeros and untrained magnitudes.
        classes: What the configuration of a classifier says of its classes, from
            ``rankflow.json``; None where it tells nothing.
    """

    base_model: str
    sites: tuple[SiteSummary, ...]
    other_parameters: int
    trained_parameters: int | None = None
    classes: Mapping[str, Any] | None = None

    @property
    def parameters(self) -> int:
        """Parameters of all sites."""
        return sum(site.parameters for site in self.sites)

    @property
    def ranks(self) -> dict[str, int]:
        """Rank of each site, by site name."""
        return {site.name: site.rank for site in self.sites}


def inspect_adapter(folder: str | Path) -> AdapterSummary:
    """Summarise a LoRA or DoRA adapter that PEFT or RankFlow saved.

    Args:
        folder: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.

    Raises:
        RankFlowError: A file is missing or damaged, or the adapter is of another kind.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        inner = folder / "adapter"  # of a run
        hint = (
            f"did you mean {inner}?" if (inner / CONFIG).is_file() else "name an adapter's folder"
        )
        raise RankFlowError(f"{folder} holds no {CONFIG}; {hint}")
    config = read_lora_config(folder)
    parts, other = _group(read_weights(folder))
    sites = (_summarise(site, parts[site], config) for site in sorted(parts, key=_natural_order))
    base_model = config.get("base_model_name_or_path") or ""
    facts = _read_facts(folder)
    return AdapterSummary(
        base_model,
        tuple(sites),
        other,
        facts.get("trained_parameters"),
        facts.get("classes"),
    )


def _read_facts(folder: Path) -> dict[str, Any]:
    path = folder / FACTS
    facts = read_json(contained(folder, FACTS)) if path.is_file() else None
    if not isinstance(facts, dict):
        return {}
    trained, classes = facts.get("trained_parameters"), facts.get("classes")
    if trained is not None and (type(trained) is not int or trained < 0):
        raise FileError(f"{path} has trained_parameters = {excerpt(trained)}; remove the file")
    if classes is not None and not _are_classes(classes):
        raise FileError(f"{path} has classes = {excerpt(classes)}; remove the file")
    return facts


def _are_classes(classes: Any) -> bool:
    names = classes.get("id2label") if isinstance(classes, dict) else None
    return (
        isinstance(names, dict)
        and all(key.isdecimal() and isinstance(name, str) for key, name in names.items())
        and isinstance(classes.get("problem_type", 0), str | None)
    )


def _group(file: TensorFile) -> tuple[dict[str, Shapes], int]:
    """Return the shapes of the LoRA tensors by site, and how many other parameters there are."""
    parts: dict[str, Shapes] = {}
    other = 0
    for key, tensor in file.tensors.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            other += math.prod(tensor.shape)
            continue
        axes = 2 if match["part"][-1] in "AB" and not key.endswith(".bias") else 1
        if not tensor.is_float or len(tensor.shape) < axes:
            raise FileError(
                f"{file.path} holds {key} of type {tensor.dtype} and shape {tensor.shape}; real "
                f"numbers on at least {axes} axes were expected: save or copy it again"
            )
        parts.setdefault(match["site"], {})[key] = tensor.shape
    if not parts:
        raise RankFlowError(f"{file.path} holds no LoRA tensor; was it saved by PEFT?")
    return parts, other


def _summarise(site: str, shapes: Shapes, config: Mapping[str, Any]) -> SiteSummary:
    rank = _count_components(shapes)
    return SiteSummary(
        name=site,
        rank=rank,
        config_rank=_by_pattern(config.get("rank_pattern"), site, config["r"]),
        alpha=_by_pattern(config.get("alpha_pattern"), site, config["lora_alpha"]),
        has_magnitude=any("lora_magnitude_vector" in key for key in shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        rank_stabilised=bool(config.get("use_rslora")),
    )


def _count_components(shapes: Shapes) -> int:
    """Return the rank that both factors of a site have."""
    found = {}
    for key in shapes:
        match = _TENSOR.fullmatch(key)
        if match is not None and match["part"][-1] in "AB" and not key.endswith(".bias"):
            found[match["part"][-1]] = key
    if not found:
        return 0
    if len(found) == 1:
        (key,) = found.values()
        raise FileError(f"{key} stands without its other factor; save or copy the adapter again")
    a, b = shapes[found["A"]], shapes[found["B"]]
    if a[0] != b[1]:
        raise FileError(
            f"{found['A']} has the shape {a} and {found['B']} the shape {b}, which are not of one "
            "rank; save or copy the adapter again"
        )
    return a[0]


def _by_pattern(pattern_values: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    pattern = match_pattern(pattern_values or {}, site)
    return default if pattern is None else (pattern_values or {})[pattern]


def _natural_order(site: str) -> list[tuple[bool, int, str]]:
    """Sort key that counts: layer 2 comes before layer 10."""
    return [
        (part.isdecimal(), int(part) if part.isdecimal() else 0, part)
        for part in re.split(r"(\d+)", site)
    ]
