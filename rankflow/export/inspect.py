"""What an adapter folder holds, told from its configuration and the header of its weights.

No tensor is read and torch is not imported, so that looking at an adapter of any size is instant.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from rankflow.errors import RankFlowError
from rankflow.specs.budget import match_pattern

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
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
    config = _read_config(folder / CONFIG)
    shapes = _read_shapes(folder / WEIGHTS)
    parts: dict[str, Shapes] = {}
    other = 0
    for key, shape in shapes.items():
        match = _TENSOR.fullmatch(key)
        if match is None:
            other += math.prod(shape)
        else:
            parts.setdefault(match["site"], {})[key] = shape
    if not parts:
        raise RankFlowError(f"{folder / WEIGHTS} holds no LoRA tensor; was it saved by PEFT?")
    sites = (_summarise(site, parts[site], config) for site in sorted(parts, key=_natural_order))
    base_model = config.get("base_model_name_or_path") or ""
    facts = _read_facts(folder / FACTS)
    return AdapterSummary(
        base_model,
        tuple(sites),
        other,
        facts.get("trained_parameters"),
        facts.get("classes"),
    )


def _read_facts(path: Path) -> dict[str, Any]:
    facts = _read_json(path) if path.is_file() else None
    return facts if isinstance(facts, dict) else {}


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RankFlowError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RankFlowError(
            f"{path} is not valid JSON: {error}; save or copy the adapter again"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    config = _read_json(path)
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise RankFlowError(
            f"{path} has peft_type {kind!r}; only LORA (LoRA, DoRA) can be read; "
            "name another adapter"
        )
    for key in ("r", "lora_alpha"):
        if key not in config:
            raise RankFlowError(f"{path} lacks the key {key!r}; was it saved by PEFT?")
    return dict(config)


def _read_shapes(path: Path) -> Shapes:
    try:
        with safe_open(path, framework="numpy") as file:
            keys = file.keys()
            return {key: tuple(file.get_slice(key).get_shape()) for key in keys}
    except OSError as error:
        raise RankFlowError(
            f"{path} cannot be read: {error.strerror or error}; save or copy the adapter again"
        ) from error
    except SafetensorError as error:
        raise RankFlowError(f"{path} is damaged: {error}; save or copy it again") from error


def _summarise(site: str, shapes: Shapes, config: Mapping[str, Any]) -> SiteSummary:
    a_shapes = [
        shape for key, shape in shapes.items() if re.search(r"\.lora_(embedding_)?A\b", key)
    ]
    return SiteSummary(
        name=site,
        rank=a_shapes[0][0] if a_shapes else 0,
        config_rank=_by_pattern(config.get("rank_pattern"), site, config["r"]),
        alpha=_by_pattern(config.get("alpha_pattern"), site, config["lora_alpha"]),
        has_magnitude=any("lora_magnitude_vector" in key for key in shapes),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        rank_stabilised=bool(config.get("use_rslora")),
    )


def _by_pattern(pattern_values: Mapping[str, Any] | None, site: str, default: Any) -> Any:
    pattern = match_pattern(pattern_values or {}, site)
    return default if pattern is None else (pattern_values or {})[pattern]


def _natural_order(site: str) -> list[tuple[bool, int, str]]:
    """Sort key that counts: layer 2 comes before layer 10."""
    return [
        (part.isdigit(), int(part) if part.isdigit() else 0, part)
        for part in re.split(r"(\d+)", site)
    ]
