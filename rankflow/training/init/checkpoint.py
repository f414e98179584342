"""Look at a model without loading it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from huggingface_hub import get_safetensors_metadata
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, NotASafetensorsRepoError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from rankflow.errors import SpecError, brief
from rankflow.export.report import measure_files
from rankflow.model_files import check_model
from rankflow.specs.run import BUILT_IN_MODEL, Pooling
from rankflow.strict_json import read_json
from rankflow.training.locating import count_positions, has_words, locate, reads_both_ways

Family = Literal["encoder", "decoder", "encoder-decoder"]

_HEADED: Final = "ForSequenceClassification"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a model's files say of it.

    Attributes:
        family: Whether it reads a text whole, continues it, or turns it into another.
        parameters: How many it has; None where that cannot be told without loading it.
        dtype: The type that its weights are stored in; None if its configuration does not say.
        positions: Longest text (tokens); None where there is no end.
        pooling: How a text classifier on it had best turn tokens into one vector.
        tokenizer: Its tokenizer.
    """

    family: Family
    parameters: int | None
    dtype: str | None
    positions: int | None
    pooling: Pooling
    tokenizer: PreTrainedTokenizerBase


def read_checkpoint(name: str, template: Path | None) -> Checkpoint:
    """Read a model's configuration and tokenizer.

    Args:
        name: ``minilm``, a folder, or a hub id.
        template: File with a chat template that takes the place of the tokenizer's own.

    Raises:
        SpecError: There is no such model or template, or its architecture is not known here.
    """
    path = locate(name)
    check_model(path)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise SpecError(
            f"--model {name}: {brief(error)}; give '{BUILT_IN_MODEL}', a folder with a model and "
            "its tokenizer, or a hub id (which needs a connection or a filled cache)"
        ) from error
    if not has_words(tokenizer):
        raise SpecError(
            f"--model {name}: its tokenizer has no word, only special tokens; put the model's "
            "tokenizer files into its folder"
        )
    if template is not None:
        if not template.is_file():
            raise SpecError(f"--chat-template {template}: no such file")
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    family = _family(name, config)
    dtype = None if config.dtype is None else str(config.dtype).removeprefix("torch.")
    return Checkpoint(
        family=family,
        parameters=_count_parameters(path),
        dtype=dtype,
        positions=count_positions(config),
        pooling=_pooling(path, config) if family == "encoder" else "model",
        tokenizer=tokenizer,
    )


def _family(name: str, config: PretrainedConfig) -> Family:
    if config.is_encoder_decoder:
        return "encoder-decoder"
    if reads_both_ways(config):
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise SpecError(
        f"--model {name}: '{config.model_type}' is no language model; rankflow train takes models "
        "of text (others train with RankFlowCallback in a Trainer of your own)"
    )


def _pooling(path: str, config: PretrainedConfig) -> Pooling:
    """A checkpoint keeps the head it has; a bare encoder gets one on pooled tokens."""
    file = Path(path) / "1_Pooling" / "config.json"  # of sentence-transformers
    if file.is_file():
        modes = read_json(file)
        return "cls" if isinstance(modes, dict) and modes.get("pooling_mode_cls_token") else "mean"
    pools_tokens = config.model_type in MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES
    return "mean" if pools_tokens and not _architecture(config).endswith(_HEADED) else "model"


def _architecture(config: PretrainedConfig) -> str:
    return (config.architectures or [""])[0]


def _count_parameters(path: str) -> int | None:
    if Path(path).is_dir():
        return measure_files(Path(path))[0] or None
    try:
        return sum(get_safetensors_metadata(path).parameter_count.values())
    except (OSError, HfHubHTTPError, HFValidationError, NotASafetensorsRepoError):
        return None
