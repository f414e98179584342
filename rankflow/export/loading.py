"""Load an adapter's folder on its base model, by transformers and PEFT alone."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import transformers
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rankflow.errors import ExportError, brief
from rankflow.export.inspect import WEIGHTS

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
_LAST_LAYERS: Final = ("classifier", "out_proj", "score")
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
    config: LoraConfig = LoraConfig.from_pretrained(adapter)
    name = base_model or config.base_model_name_or_path
    if not name:
        raise ExportError(f"{adapter} does not say what its base model is; name it with --base")
    task = getattr(config.task_type, "value", config.task_type)
    if task is not None and task not in _CLASSES:
        raise ExportError(
            f"{adapter} is for the task {task}, for which no class of transformers is known; load "
            "the model yourself and call rankflow.export_adapter"
        )
    settings: dict[str, Any] = {}
    labels = _count_labels(adapter) if task in _CLASSIFIERS else None
    if labels is not None:  # the base's own head, of other classes perhaps, is replaced
        settings = {"num_labels": labels, "ignore_mismatched_sizes": True}
    try:
        if task is None:
            base = _load_own_class(name)
        else:
            base = _CLASSES[task].from_pretrained(name, **settings)
        with without_repeated_notes():
            return PeftModel.from_pretrained(base, adapter)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ExportError(
            f"cannot load the adapter {adapter} on the base model {name!r}: {brief(error)}; name "
            "another one with --base"
        ) from error


def _load_own_class(name: str) -> Any:
    """Load a model by the class that saved it; only transformers' own are trusted."""
    saved = getattr(AutoConfig.from_pretrained(name), "architectures", None) or ["AutoModel"]
    return getattr(transformers, saved[0], AutoModel).from_pretrained(name)


def _count_labels(adapter: Path) -> int | None:
    """Return the rows of the head that was saved with the adapter; None if there is none."""
    with safe_open(adapter / WEIGHTS, framework="numpy") as file:
        for key in file.keys():  # noqa: SIM118 - the handle has keys() and no iterator
            path = key.split(".")
            if path[-1] == "weight" and path[-2] in _LAST_LAYERS and ".lora_" not in key:
                return int(file.get_slice(key).get_shape()[0])
    return None
