"""Put the stock PEFT adapter of a run on its base model."""

import re
from collections.abc import Mapping
from typing import Any

from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from torch import nn

from rankflow.adapters.stock import check_initialisation
from rankflow.errors import SpecError, brief
from rankflow.specs.budget import match_pattern
from rankflow.specs.reading import suggest
from rankflow.specs.run import ModelSpec
from rankflow.training.models import BaseModel


def add_adapter(base: BaseModel, spec: ModelSpec | None, adapter: Mapping[str, Any]) -> PeftModel:
    """Wrap the base model; what trains is the adapter, and the task head in full.

    Args:
        base: The loaded base model, changed in place.
        spec: The run's ``[model]``; None for a model that is not of transformers.
        adapter: The run's ``[adapter]``, passed to ``peft.LoraConfig``.

    Raises:
        SpecError: PEFT refuses the adapter, e.g. because no module has a target's name.
        SiteError: Its initialisation moves part of the base weights into it.
    """
    check_initialisation(adapter.get("init_lora_weights", True), "default")
    full = {*(adapter.get("modules_to_save") or ()), *base.full_modules}
    config = LoraConfig(
        task_type=task_type(spec), **{**adapter, "modules_to_save": sorted(full) or None}
    )
    linear = {
        name.rpartition(".")[2]
        for name, module in base.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    name = f"'{spec.name}'" if spec is not None else type(base.model).__name__
    try:
        return get_peft_model(base.model, config)
    except (TypeError, ValueError, IndexError, ImportError, re.error) as error:
        raise SpecError(
            f"[adapter]: PEFT refuses it: {brief(error)}; target_modules = "
            f"{adapter.get('target_modules')!r}, and the linear modules of {name} are called "
            f"{', '.join(sorted(linear))}"
        ) from error


def check_names(model: PeftModel, adapter: Mapping[str, Any]) -> None:
    """Refuse names and patterns of which PEFT finds no module, while it finds some of others.

    Args:
        model: The model with the adapter on it.
        adapter: The run's ``[adapter]``.

    Raises:
        SpecError: There is one.
    """
    sites = model.base_model.targeted_module_names
    modules = [name for name, _ in model.base_model.model.named_modules()]
    places = {"target_modules": sites, "rank_pattern": sites, "alpha_pattern": sites}
    for key, names in (places | {"modules_to_save": modules}).items():
        given = adapter.get(key) or ()
        for pattern in () if isinstance(given, str) else given:
            if not any(match_pattern([pattern], name) for name in names):
                endings = {name.rpartition(".")[2] for name in names}
                raise SpecError(
                    f"[adapter] {key}: no module is called '{pattern}'; {suggest(pattern, endings)}"
                )


def task_type(spec: ModelSpec | None) -> TaskType | None:
    """Return PEFT's name for the task; a classifier that pools is a token classifier.

    None for a model that is not of transformers.
    """
    if spec is None:
        return None
    if spec.task == "causal-lm":
        return TaskType.CAUSAL_LM
    if spec.task == "seq2seq-lm":
        return TaskType.SEQ_2_SEQ_LM
    if spec.task == "sequence-classification" and spec.pooling == "model":
        return TaskType.SEQ_CLS
    return TaskType.TOKEN_CLS
