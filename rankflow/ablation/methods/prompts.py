"""Prompt tuning and prefix tuning, by PEFT.

Both set learnt vectors before the text: prompt tuning before its embeddings, prefix tuning before
the keys and values of every attention layer. The text moves back by as many positions, so a model
needs positions for both.
"""

import inspect
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Final

from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, PromptTuningInit

from rankflow.ablation.methods.method import Method, Setting, UnsupportedError
from rankflow.ablation.methods.peft_tuners import PeftMethod, make_config
from rankflow.training.models import BaseModel

_MOST_TOKENS: Final = 16384  # where the model does not say how many positions it has


def _room(base: BaseModel, setting: Setting) -> range:
    """Return the numbers of virtual tokens that the positions leave room for."""
    positions = getattr(base.model.config, "max_position_embeddings", None)
    room = _MOST_TOKENS if positions is None else positions - setting.max_length
    if room < 1:
        raise UnsupportedError(
            f"the model has {positions} positions, and texts of {setting.max_length} tokens leave "
            "none for virtual tokens; set a smaller max_length in [data] and [forgetting]"
        )
    return range(1, room + 1)


def _prompt_lengths(base: BaseModel, setting: Setting) -> Sequence[int]:
    spec = setting.model
    if spec is None:
        raise UnsupportedError("the model has no embeddings, before which tokens could be put")
    if spec.task == "token-classification":
        raise UnsupportedError("PEFT's prompt tuning does not align labels of single tokens")
    by_last = spec.task == "sequence-classification" and spec.pooling == "model"
    if by_last and "score" in base.full_modules:
        raise UnsupportedError(
            "a decoder's own classifier finds the last token of a text by its ids, and prompt "
            "tuning passes embeddings; pool by 'mean' instead"
        )
    return _room(base, setting)


def _prompt(setting: Setting, size: int, base: BaseModel) -> PeftConfig:
    start = PromptTuningInit.SAMPLE_VOCAB  # better than random numbers in the paper
    keywords = {"num_virtual_tokens": size, "prompt_tuning_init": start}
    return make_config(PromptTuningConfig, base, setting, keywords)


def _prefix_lengths(base: BaseModel, setting: Setting) -> Sequence[int]:
    backbone = getattr(base.model, "base_model", base.model)
    if "past_key_values" not in inspect.signature(backbone.forward).parameters:
        raise UnsupportedError(
            f"the attention of {type(backbone).__name__} takes no keys and values from outside, "
            "which prefix tuning consists of"
        )
    return _room(base, setting)


def _prefix(setting: Setting, size: int, base: BaseModel) -> PeftConfig:
    return make_config(PrefixTuningConfig, base, setting, {"num_virtual_tokens": size})


PROMPTS: Final[Mapping[str, Method]] = MappingProxyType(
    {
        "prompt": PeftMethod(
            summary="prompt tuning by PEFT: trained embeddings before the text",
            source="arXiv 2104.08691",
            rate=1e-2,
            size_name="virtual tokens",
            list_sizes=_prompt_lengths,
            configure=_prompt,
            mergeable=False,
        ),
        "prefix": PeftMethod(
            summary="prefix tuning by PEFT: trained keys and values before every attention layer's",
            source="arXiv 2101.00190",
            rate=8e-2,
            size_name="virtual tokens",
            list_sizes=_prefix_lengths,
            configure=_prefix,
            mergeable=False,
        ),
    }
)
