"""The methods that PEFT implements and that need no help while they train."""

import copy
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final

from peft import OFTConfig, PeftConfig, PeftModel, VeraConfig, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import nn

from rankflow.ablation.methods.method import Built, Method, Setting, UnsupportedError
from rankflow.ablation.methods.targets import Target, find_targets, full_modules
from rankflow.errors import SpecError
from rankflow.quiet import quiet_libraries
from rankflow.training.adapter import task_type
from rankflow.training.models import BaseModel

# VeRA computes with rank * (in + out) frozen numbers for every rank + out that it trains: at this
# rank its two products cost 43 times as much as a square layer of MiniLM.
_HIGHEST_VERA_RANK: Final = 8192


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """A row that is one PEFT configuration.

    Attributes:
        summary: One line for people.
        source: The paper.
        rate: A usual learning rate, where tuning starts.
        size_name: What the size is called.
        list_sizes: The sizes, in order of the parameters that they train.
        configure: The configuration of a size.
        mergeable: Whether PEFT can fold the adaptation into the base weights.
        scalings: Factors on the adapter's scale that are tuned.
        quantised: Whether the base weights are in 4 bits.
    """

    summary: str
    source: str
    rate: float
    size_name: str
    list_sizes: Callable[[BaseModel, Setting], Sequence[int]]
    configure: Callable[[Setting, int, BaseModel], PeftConfig]
    mergeable: bool = True
    scalings: tuple[float, ...] = (1.0,)
    quantised: bool = False

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return the sizes to choose from.

        Raises:
            UnsupportedError: The method cannot run on this model.
        """
        return self.list_sizes(base, setting)

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Wrap the base model by PEFT.

        Raises:
            UnsupportedError: PEFT refuses the model.
        """
        assert size is not None
        model = add_tuner(base, self.configure(setting, size, base))
        return Built(model, merge=partial(merge_copy, model) if self.mergeable else None)


def make_config(
    kind: type[PeftConfig], base: BaseModel, setting: Setting, keywords: Mapping[str, Any]
) -> PeftConfig:
    """Return a configuration for the task, where what the spec says of the method comes first.

    Raises:
        SpecError: PEFT refuses it.
    """
    shared = {
        "task_type": task_type(setting.model),
        "modules_to_save": full_modules(base, setting),
    }
    try:
        return kind(**{**shared, **keywords, **setting.options})
    except (TypeError, ValueError) as error:
        raise SpecError(f"config = {dict(setting.options)}: {error}") from error


def add_tuner(base: BaseModel, config: PeftConfig) -> PeftModel:
    """Wrap a base model by PEFT.

    Raises:
        UnsupportedError: PEFT refuses the model.
    """
    device = next(base.model.parameters()).device
    # For a model on meta, PEFT's VeRA would else draw its projections in real memory.
    on_meta = device.type == "meta" and isinstance(config, VeraConfig)
    try:
        with quiet_libraries(), device if on_meta else nullcontext():
            return get_peft_model(base.model, config)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(f"PEFT refuses this model: {error}") from error


def merge_copy(model: PeftModel) -> nn.Module:
    """Return the base model with the adaptation folded in; the given model stays as it is."""
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        # PEFT unpacks such a module itself only if it is a layer with a weight, which poolers are
        # not.
        if isinstance(module, ModulesToSaveWrapper):
            merged.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    with warnings.catch_warnings():
        # Rounding to 4 bits changes outputs a little; a merged copy is timed, and never judged.
        warnings.filterwarnings("ignore", "Merge lora module to 4-bit linear")
        return merged.merge_and_unload()


def _vera_ranks(base: BaseModel, setting: Setting) -> Sequence[int]:
    find_targets(base, setting)
    return range(1, _HIGHEST_VERA_RANK + 1)


def _vera(setting: Setting, size: int, base: BaseModel) -> PeftConfig:
    targets = find_targets(base, setting)
    keywords = {
        "r": size,
        "target_modules": list(targets),
        "vera_dropout": setting.adapter.get("lora_dropout", 0.0),
        "projection_prng_key": setting.seed,
        "save_projection": False,
        "fan_in_fan_out": next(iter(targets.values())).transposed,
    }
    with warnings.catch_warnings():
        # The key makes the projections again, so they need not be stored; PEFT advises against it.
        warnings.filterwarnings("ignore", "Specified to not save vera_A and vera_B")
        return make_config(VeraConfig, base, setting, keywords)


def _oft_blocks(base: BaseModel, setting: Setting) -> Sequence[int]:
    """The widths of a block that every site's input divides into: PEFT would change others."""
    common = math.gcd(*(target.inputs for target in straight_targets(base, setting).values()))
    blocks = [width for width in range(2, common + 1) if common % width == 0]
    if not blocks:
        raise UnsupportedError("the input widths of the sites have no common divisor for blocks")
    return blocks


def _oft(setting: Setting, size: int, base: BaseModel) -> PeftConfig:
    keywords = {
        "oft_block_size": size,
        "use_cayley_neumann": False,  # the paper's exact transform
        "target_modules": list(find_targets(base, setting)),
    }
    return make_config(OFTConfig, base, setting, keywords)


def straight_targets(base: BaseModel, setting: Setting) -> dict[str, Target]:
    """Return the targets of a method that PEFT implements for ``nn.Linear`` alone.

    Raises:
        UnsupportedError: A target stores its weight the other way round.
    """
    targets = find_targets(base, setting)
    for name, target in targets.items():
        if target.transposed:
            raise UnsupportedError(
                f"{name} is a Conv1D of transformers, which PEFT's orthogonal methods do not take"
            )
    return targets


TUNERS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "vera": PeftMethod(
            summary="VeRA by PEFT: one frozen random pair for all sites, trained scaling vectors",
            source="arXiv 2310.11454",
            rate=6.4e-2,
            size_name="rank",
            list_sizes=_vera_ranks,
            configure=_vera,
        ),
        "oft": PeftMethod(
            summary="OFT by PEFT: the inputs of every site rotated in blocks, by exact Cayley maps",
            source="arXiv 2306.07280",
            rate=8e-3,
            size_name="block size",
            list_sizes=_oft_blocks,
            configure=_oft,
        ),
    }
)
