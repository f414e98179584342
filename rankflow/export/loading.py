"""Load an adapter's folder on its base model, by stock libraries alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import torch
import transformers
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from rankflow.errors import ExportError, RankFlowError, brief
from rankflow.export.adapter_files import read_lora_config, read_weights
from rankflow.export.fit import check_fit
from rankflow.export.inspect import inspect_adapter
from rankflow.model_files import SAFE, check_model
from rankflow.strict_json import read_json

_CLASSES: Final = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "FEATURE_EXTRACTION": AutoModel,
    "QUESTION_ANS": AutoModelForQuestionAnswering,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "TOKEN_CLS": AutoModelForTokenClassification,
}
_CLASSIFIERS: Final = ("SEQ_CLS", "TOKEN_CLS")
# The last layer of a classifier, as transformers names it.
_LAST_LAYERS: Final = (["classifier"], ["out_proj"], ["score"])
_NOTES: Final = (
    "fan_in_fan_out is set to",
    "Model (has|with) `tie_word_embeddings=True`",
    "`is_gradient_checkpointing` is deprecated",  # PEFT 0.21 asks for it under its old name
)


@contextmanager
def without_repeated_notes() -> Iterator[None]:
    """Hide what PEFT says whenever it wraps a model, and so said when the adapter was made."""
    with warnings.catch_warnings():
        for note in _NOTES:
            warnings.filterwarnings("ignore", message=note)
        yield


def load_adapted(adapter: Path, base_model: str | None = None) -> PeftModel:
    """Load an adapter and the base model that it names, its class taken from PEFT's task type.

    Args:
        adapter: The adapter's folder.
        base_model: A folder or hub id in place of the one that the adapter names.

    Raises:
        ExportError: There is no such model, no class for the task, or the two do not fit.
    """
    name = base_model or _named_base(adapter)
    check_model(name)
    try:
        base = _load_base(adapter, name)
        check_fit(adapter, base)
        with without_repeated_notes():
            return PeftModel.from_pretrained(base, adapter)
    except RankFlowError:
        raise
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise ExportError(
            f"cannot load the adapter {adapter} on the base model {name!r}: {brief(error)}; name "
            "another one with --base"
        ) from error


def count_base(adapter: Path, base_model: str | None = None) -> int:
    """Count the parameters of an adapter's base model from its configuration alone.

    Args:
        adapter: The adapter's folder.
        base_model: A folder or hub id in place of the one that the adapter names.

    Raises:
        ExportError: There is no such model of transformers, or no class for the task.
    """
    name = base_model or _named_base(adapter)
    check_model(name)
    try:
        task = _task(adapter)
        config = _read_model_config(adapter, name, task)
        kind = _class_for(task, config)
        with torch.device("meta"):
            model = kind(config) if issubclass(kind, PreTrainedModel) else kind.from_config(config)
    except RankFlowError:
        raise
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise ExportError(
            f"the configuration of the base model {name!r} cannot be read: {error}; name another "
            "one with --base"
        ) from error
    return int(model.num_parameters())


def _named_base(adapter: Path) -> str:
    name: str | None = read_lora_config(adapter).get("base_model_name_or_path")
    if not name:
        raise ExportError(f"{adapter} does not say what its base model is; name it with --base")
    return name


def _load_base(adapter: Path, name: str) -> Any:
    task = _task(adapter)
    if task is None and _is_of_diffusers(Path(name) / "config.json"):
        return _load_by_diffusers(name)
    config = _read_model_config(adapter, name, task)
    # A head in the base model, of other classes perhaps, is replaced by the adapter's.
    ignored = {"ignore_mismatched_sizes": True} if task in _CLASSIFIERS else {}
    return _class_for(task, config).from_pretrained(name, config=config, **SAFE, **ignored)


def _read_model_config(adapter: Path, name: str, task: str | None) -> PretrainedConfig:
    return AutoConfig.from_pretrained(
        name, trust_remote_code=False, **_head_settings(adapter, task)
    )


def _task(adapter: Path) -> str | None:
    """Return PEFT's name for an adapter's task."""
    task: str | None = read_lora_config(adapter).get("task_type")
    if task is not None and task not in _CLASSES:
        raise ExportError(
            f"{adapter} is for the task {task}, for which no class of transformers is known; load "
            "the model yourself and call rankflow.export_adapter"
        )
    return task


def _class_for(task: str | None, config: PretrainedConfig) -> Any:
    """Return the class of a task, or the one that saved the model; transformers' own is trusted."""
    if task is not None:
        return _CLASSES[task]
    saved = config.architectures or ["AutoModel"]
    return getattr(transformers, saved[0], AutoModel)


def _head_settings(adapter: Path, task: str | None) -> dict[str, Any]:
    """Return what a classifier's configuration must say of the head saved with the adapter."""
    if task not in _CLASSIFIERS:
        return {}
    labels = _count_labels(adapter)
    classes = inspect_adapter(adapter).classes
    if classes is None:
        return {} if labels is None else {"num_labels": labels}
    names = {int(index): name for index, name in classes["id2label"].items()}
    return {
        "id2label": names,
        "label2id": {name: index for index, name in names.items()},
        "problem_type": classes["problem_type"],
    }


def _is_of_diffusers(config: Path) -> bool:
    return config.is_file() and "_class_name" in read_json(config)


def _load_by_diffusers(name: str) -> Any:
    if find_spec("diffusers") is None:
        raise ExportError(
            f"{name} is a model of diffusers, which is not installed; install it by "
            "`pip install 'rankflow[diffusers]'`"
        )
    from diffusers import AutoModel as DiffusersModel

    return DiffusersModel.from_pretrained(name, use_safetensors=True)


def _count_labels(adapter: Path) -> int | None:
    """Return the rows of the head that was saved with the adapter; None if there is none."""
    for key, tensor in read_weights(adapter).tensors.items():
        path = key.split(".")
        if path[-1] == "weight" and path[-2:-1] in _LAST_LAYERS and ".lora_" not in key:
            return tensor.shape[0]
    return None
