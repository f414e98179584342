"""The tables of a run spec that go to other libraries: ``[adapter]`` and ``[train]``.

Their keys and types are those of the dataclass that will receive them, read from the installed
version; there is no list here to go stale.
"""

import dataclasses
import typing
import warnings
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Annotated, Any, Final, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rankflow.specs.reading import ABSENT, Fault, Seed, check_value, unknown_key

_POSITIVE: Final = Annotated[float, Field(gt=0, allow_inf_nan=False)]
_AT_LEAST_0: Final = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_LogLevel = Literal["debug", "info", "warning", "error", "critical", "detail", "passive"]

_ADAPTER_OWNED: Final = {
    "auto_mapping": "follows from the model; remove it",
    "inference_mode": "is for adapters that are trained no more; remove it",
    "task_type": "follows from model.task; remove it",
    "target_parameters": "names tensors, and RankFlow steers modules; use target_modules",
    "peft_type": "is always LORA; remove it (use_dora = true makes it DoRA)",
}
_TRAIN_OWNED: Final = {
    "label_names": "follows from model.task; remove it",
    "seed": "is set at the top of the file, for everything at once; move it there",
}

# What PEFT does not look at, or only when the model is there.
_ADAPTER_RANGES: Final[Mapping[str, Any]] = {
    "alpha_pattern": dict[str, PositiveFloat],
    "lora_alpha": PositiveInt,
    "lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "rank_pattern": dict[str, PositiveInt],
}
# What transformers does not look at before the first step, or not at all.
_TRAIN_RANGES: Final[Mapping[str, Any]] = {
    "adam_beta1": Annotated[float, Field(ge=0, lt=1)],
    "adam_beta2": Annotated[float, Field(ge=0, lt=1)],
    "adam_epsilon": _POSITIVE,
    "data_seed": Seed,
    "dataloader_num_workers": NonNegativeInt,
    "eval_accumulation_steps": PositiveInt,
    "eval_delay": _AT_LEAST_0,
    "eval_steps": _POSITIVE,
    "gradient_accumulation_steps": PositiveInt,
    "label_smoothing_factor": Annotated[float, Field(ge=0, lt=1)],
    "learning_rate": _POSITIVE,
    "log_level": _LogLevel,
    "log_level_replica": _LogLevel,
    "logging_steps": _POSITIVE,
    "max_grad_norm": Annotated[float, Field(ge=0)],
    "neftune_noise_alpha": _AT_LEAST_0,
    "num_train_epochs": Annotated[float, Field(allow_inf_nan=False)],
    "per_device_eval_batch_size": PositiveInt,
    "per_device_train_batch_size": PositiveInt,
    "save_steps": _POSITIVE,
    "save_total_limit": PositiveInt,
    "train_sampling_strategy": Literal["random", "sequential", "group_by_length"],
    "warmup_steps": _AT_LEAST_0,
    "weight_decay": _AT_LEAST_0,
}

# PEFT takes more than it annotates: "pissa_niter_16", and lists where it says tuples.
_WIDER_THAN_ANNOTATED: Final = frozenset({"init_lora_weights", "layer_replication"})


def check_adapter(table: Mapping[str, Any]) -> list[Fault]:
    """Faults of a table that is to become ``peft.LoraConfig(**table)``."""
    from peft import LoraConfig

    faults = _check_fields(LoraConfig, table, _ADAPTER_OWNED)
    if not faults and table.get("r", 1) < 1:
        faults.append(Fault({"r": table["r"]}, "must be 1 or more; the budget sets the ranks"))
    if not faults:
        faults += _check_ranges(_ADAPTER_RANGES, table)
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
        faults += _check_ranges(_TRAIN_RANGES, table)
    if not faults:
        faults += _train_contradictions(table)
    return faults


def _train_contradictions(table: Mapping[str, Any]) -> Iterator[Fault]:
    steps = table.get("max_steps", -1)
    if steps == 0 or steps < -1:
        yield Fault({"max_steps": steps}, "must be 1 or more, or left out to count epochs")
    elif steps < 0 and table.get("num_train_epochs", 1) <= 0:
        lengths = {key: table.get(key, ABSENT) for key in ("max_steps", "num_train_epochs")}
        yield Fault(lengths, "trains no step; one of them must be above 0")
    if table.get("load_best_model_at_end") and table.get("eval_strategy", "no") == "no":
        yield Fault(
            {"load_best_model_at_end": True, "eval_strategy": table.get("eval_strategy", ABSENT)},
            "only evaluations tell which is best; set eval_strategy and save_strategy",
        )


def _check_ranges(ranges: Mapping[str, Any], table: Mapping[str, Any]) -> list[Fault]:
    return [
        fault
        for key, value in table.items()
        if key in ranges
        for fault in check_value(key, ranges[key], value)
    ]


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
