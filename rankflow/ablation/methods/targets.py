"""The modules that the methods with sites adapt: the ones that LoRA would."""

from dataclasses import dataclass

from peft import LoraConfig
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankflow.ablation.methods.method import Setting, UnsupportedError
from rankflow.training.adapter import task_type
from rankflow.training.models import BaseModel

# What of LoRA's settings decides where it sits.
_SELECTING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")


@dataclass(frozen=True, slots=True)
class Target:
    """A linear module to adapt.

    Attributes:
        inputs: Input features.
        outputs: Output features.
        transposed: Whether it stores its weight as ``(in, out)``, as GPT-2's do.
    """

    inputs: int
    outputs: int
    transposed: bool


def find_targets(base: BaseModel, setting: Setting) -> dict[str, Target]:
    """Return what LoRA would adapt under the shared settings, by name and in module order.

    Args:
        base: The base model; modules that train in full are never targets.
        setting: The shared settings.

    Raises:
        UnsupportedError: There is none, or one is not linear.
    """
    config = LoraConfig(
        task_type=task_type(setting.model),
        modules_to_save=full_modules(base, setting),
        **{key: setting.adapter[key] for key in _SELECTING if key in setting.adapter},
    )
    # "all-linear" has a meaning of PEFT's own, which leaves output layers out.
    config = _maybe_include_all_linear_layers(config, base.model)
    targets = {
        name: _read(name, module)
        for name, module in base.model.named_modules()
        if name and check_target_module_exists(config, name)
    }
    if not targets:
        raise UnsupportedError(
            f"no module fits target_modules = {setting.adapter.get('target_modules')!r}; "
            "name linear modules of this model, or 'all-linear'"
        )
    return targets


def full_modules(base: BaseModel, setting: Setting) -> list[str] | None:
    """Return the modules that train in full, the settings' own among them, as PEFT takes them."""
    return sorted({*(setting.adapter.get("modules_to_save") or ()), *base.full_modules}) or None


def _read(name: str, module: nn.Module) -> Target:
    match module:
        case nn.Linear():
            return Target(module.in_features, module.out_features, transposed=False)
        case Conv1D():
            inputs, outputs = module.weight.shape
            return Target(inputs, outputs, transposed=True)
    raise UnsupportedError(
        f"{name} is a {type(module).__name__}, and this method adapts linear modules only; "
        "leave it out of target_modules"
    )
