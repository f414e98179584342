"""The tables of a run spec that go to other libraries: ``[adapter]`` and ``[train]``.

Their keys and types are those of the dataclass that will receive them, read from the installed
version; there is no list here to go stale.
"""

import dataclasses
import typing
import warnings
from collections.abc import Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rankflow.specs.reading import ABSENT, Fault, check_value, unknown_key

_ADAPTER_OWNED: Final = {
    "task_type": "follows from model.task; remove it",
    "peft_type": "is always LORA; remove it (use_dora = true makes it DoRA)",
}
_TRAIN_OWNED: Final = {
    "seed": "is set at the top of the file, for everything at once; move it there"
}

# What transformers does not look at before the first step, or not at all.
_TRAIN_RANGES: Final[Mapping[str, Any]] = {
    "adam_beta1": Annotated[float, Field(ge=0, lt=1)],
    "adam_beta2": Annotated[float, Field(ge=0, lt=1)],
    "dataloader_num_workers": NonNegativeInt,
    "gradient_accumulation_steps": PositiveInt,
    "learning_rate": PositiveFloat,
    "max_grad_norm": Annotated[float, Field(ge=0)],
    "per_device_eval_batch_size": PositiveInt,
    "per_device_train_batch_size": PositiveInt,
    "weight_decay": Annotated[float, Field(ge=0)],
}

# PEFT takes more than it annotates: "pissa_niter_16", and lists where it says tuples.
_WIDER_THAN_ANNOTATED: Final = frozenset({"init_lora_weights", "layer_replication"})


def check_adapter(table: Mapping[str, Any]) -> list[Fault]:
    """Faults of a table that is to become ``peft.LoraConfig(**table)``."""
    from peft import LoraConfig

    faults = _check_fields(LoraConfig, table, _ADAPTER_OWNED)
    if not faults and table.get("r", 1) < 1:
        faults.append(Fault({"r": table["r"]}, "must be 1 or more; the budget sets the ranks"))
    if faults:
        return faults  # without the faulty keys, PEFT would complain of what follows from them
    try:
        with warnings.catch_warnings(action="ignore"):  # the training warns, not the check
            LoraConfig(**table)
    except (ValueError, TypeError, ImportError) as error:
        return [Fault(table, f"PEFT refuses it: {str(error).strip()}")]
    return []


def check_train(table: Mapping[str, Any]) -> list[Fault]:
    """Faults of a table that is to become ``transformers.TrainingArguments(**table)``."""
    from transformers import TrainingArguments

    faults = _check_fields(TrainingArguments, table, _TRAIN_OWNED)
    if not faults:
        for key in _TRAIN_RANGES.keys() & table.keys():
            faults += check_value(key, _TRAIN_RANGES[key], table[key])
    if not faults and table.get("max_steps", -1) <= 0 and table.get("num_train_epochs", 1) <= 0:
        lengths = {key: table.get(key, ABSENT) for key in ("max_steps", "num_train_epochs")}
        faults.append(Fault(lengths, "trains no step; one of them must be above 0"))
    return faults


def _check_fields(
    receiver: type, table: Mapping[str, Any], owned: Mapping[str, str]
) -> list[Fault]:
    hints = typing.get_type_hints(receiver)
    known = [field.name for field in dataclasses.fields(receiver) if field.init]
    faults: list[Fault] = []
    for key, value in table.items():
        if key in owned:
            faults.append(Fault({key: value}, owned[key]))
        elif key not in known:
            faults.append(unknown_key(key, value, [k for k in known if k not in owned]))
        elif key not in _WIDER_THAN_ANNOTATED:
            faults += check_value(key, _narrow(hints[key]), value)
    return faults


def _narrow(annotation: Any) -> Any:
    """The enum's values for ``Enum | str``, because the receiver takes no other string."""
    members = typing.get_args(annotation)
    for member in members:
        if isinstance(member, type) and issubclass(member, Enum):
            values = Literal[tuple(choice.value for choice in member)]  # type: ignore[valid-type]
            return values | None if type(None) in members else values
    return annotation
