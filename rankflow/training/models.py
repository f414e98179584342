"""Build the base model of a run and its tokenizer, and check that the two fit."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rankflow.errors import FileError, RankFlowError, SpecError, brief
from rankflow.model_files import SAFE, check_model
from rankflow.quiet import quiet_libraries
from rankflow.specs.run import BUILT_IN_MODEL, ModelSpec
from rankflow.training.locating import count_positions, has_words, locate, reads_both_ways


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A loaded base model.

    Attributes:
        model: The stock transformers model.
        tokenizer: Its tokenizer, which can pad.
        new_modules: Modules that the checkpoint does not hold and that start at random.
        full_modules: Modules that train in full and are saved with the adapter: the task head, and
            whatever is new. No site may lie in them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    new_modules: tuple[str, ...]
    full_modules: tuple[str, ...]


def load_base_model(
    spec: ModelSpec,
    labels: tuple[str, ...],
    quantization: BitsAndBytesConfig | None = None,
) -> BaseModel:
    """Load the pretrained weights under a head for the task.

    Args:
        spec: Which model, for which task.
        labels: Class names by index; empty for language models.
        quantization: How to store the linear layers in fewer bits; None keeps the spec's ``dtype``.

    Raises:
        SpecError: There is no such model, or none of its kind for the task, or with its attention.
        RankFlowError: The checkpoint is incomplete, or the tokenizer is another model's.
    """
    path = locate(spec.name)
    config = load_config(spec, labels)
    tokenizer = load_tokenizer(spec)
    try:
        with quiet_libraries():
            model, info = auto_class(spec).from_pretrained(
                path,
                config=config,
                revision=spec.revision,
                dtype=spec.dtype,
                quantization_config=quantization,
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **SAFE,
            )
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise _refusal(spec, error) from error
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    check_vocabulary(model, tokenizer)
    if model.config.pad_token_id is None:  # decoders that classify look for the last real token
        model.config.pad_token_id = tokenizer.pad_token_id
    new = _new_modules(absent, model.base_model_prefix, spec)
    return BaseModel(model, tokenizer, new, tuple(sorted({*new, *_head_modules(model, spec)})))


def build_meta_model(spec: ModelSpec, labels: tuple[str, ...]) -> BaseModel:
    """Build the model without numbers, on the ``meta`` device; nothing of its weights is read.

    Raises:
        SpecError: There is no such model, or none of its kind for the task, or with its attention.
        RankFlowError: The tokenizer is another model's.
    """
    config, tokenizer = load_config(spec, labels), load_tokenizer(spec)
    try:
        with torch.device("meta"):
            model = auto_class(spec).from_config(config, dtype=getattr(torch, spec.dtype))
    except (ValueError, ImportError) as error:
        raise _refusal(spec, error) from error
    check_vocabulary(model, tokenizer)
    return BaseModel(model, tokenizer, (), _head_modules(model, spec))


def load_config(spec: ModelSpec, labels: tuple[str, ...]) -> PretrainedConfig:
    """Load the model's configuration, with the classes of the task written into it.

    Raises:
        SpecError: There is no such model, or it cannot do the task.
    """
    settings: dict[str, Any] = {"trust_remote_code": False}
    if spec.attention is not None:
        settings["attn_implementation"] = spec.attention
    if labels:
        settings["id2label"] = dict(enumerate(labels))
        settings["label2id"] = {label: index for index, label in enumerate(labels)}
    path = _locate(spec)
    try:
        config = AutoConfig.from_pretrained(path, revision=spec.revision, **settings)
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise SpecError(
            f"[model] name = '{spec.name}': {brief(error)}; give '{BUILT_IN_MODEL}', a folder that "
            "`save_pretrained` wrote, or a hub id (which needs a connection or a filled cache)"
        ) from error
    if spec.task == "causal-lm" and reads_both_ways(config):
        raise SpecError(
            f"[model] name = '{spec.name}', task = 'causal-lm': a {config.model_type} reads in "
            "both directions and would see the words that it has to predict; choose a model that "
            "reads from left to right, or another task"
        )
    if not labels:
        config.use_cache = False  # of use in generation only
    if spec.dropout is not None:
        _set_dropout(config, spec)
    return config


def _set_dropout(config: PretrainedConfig, spec: ModelSpec) -> None:
    """Set every dropout probability; architectures call them by many names."""
    probabilities = [
        key
        for key, value in config.to_dict().items()
        if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float | int)
    ]
    if not probabilities:
        raise SpecError(
            f"[model] dropout = {spec.dropout}: a {config.model_type} has no dropout; leave it out"
        )
    for key in probabilities:
        setattr(config, key, spec.dropout)


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Load the model's tokenizer with the spec's chat template, and make sure that it can pad.

    Raises:
        SpecError: There is none.
        RankFlowError: It has no token to pad with.
    """
    path = _locate(spec)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, revision=spec.revision, trust_remote_code=False
        )
    except Exception as error:  # a damaged file makes these libraries raise anything
        raise SpecError(
            f"[model] name = '{spec.name}': no tokenizer ({brief(error)}); put the model's "
            "tokenizer files into its folder"
        ) from error
    if not has_words(tokenizer):
        raise SpecError(
            f"[model] name = '{spec.name}': its tokenizer has no word, only special tokens; put "
            "the model's tokenizer files into its folder"
        )
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise RankFlowError(
                f"the tokenizer of '{spec.name}' has neither a padding nor an end token; set "
                "`pad_token` in its tokenizer_config.json"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if spec.chat_template is not None:
        tokenizer.chat_template = spec.chat_template.read_text(encoding="utf-8")
    return tokenizer


def auto_class(spec: ModelSpec) -> Any:
    """Return the stock transformers class that hosts the task.

    A text classifier with pooling "mean" or "cls" is a token classifier, see
    `rankflow.training.pooling`.
    """
    if spec.task == "causal-lm":
        return AutoModelForCausalLM
    if spec.task == "seq2seq-lm":
        return AutoModelForSeq2SeqLM
    if spec.task == "sequence-classification" and spec.pooling == "model":
        return AutoModelForSequenceClassification
    return AutoModelForTokenClassification


def check_length(max_length: int, config: PretrainedConfig) -> None:
    """Refuse rows longer than the model has positions.

    Raises:
        SpecError: ``[data] max_length`` asks for them.
    """
    positions = count_positions(config)
    if positions is not None and max_length > positions:
        raise SpecError(
            f"[data] max_length = {max_length}: the model has {positions} positions; set "
            f"max_length = {positions} or less (longer texts are cut)"
        )


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer whose ids point past the model's embedding.

    Raises:
        RankFlowError: It is so.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise RankFlowError(
            f"the tokenizer's highest id is {highest}, but the model's embedding has {rows} rows: "
            "they do not belong together; put the model's own tokenizer files into its folder"
        )


def _locate(spec: ModelSpec) -> str:
    """Return the folder or hub id of the model, a folder only if its files are whole."""
    path = locate(spec.name)
    try:
        check_model(path)
    except FileError as error:
        raise SpecError(f"[model] name = '{spec.name}': {error}") from error
    return path


def _refusal(spec: ModelSpec, error: Exception) -> SpecError:
    if spec.attention is None:
        return SpecError(
            f"[model] name = '{spec.name}', task = '{spec.task}': {brief(error)}; give a whole "
            "model that transformers knows for this task"
        )
    return SpecError(
        f"[model] name = '{spec.name}', attention = '{spec.attention}': {brief(error)}; where "
        "it is the attention that this model or machine lacks, leave the key out"
    )


def _new_modules(absent: list[str], prefix: str, spec: ModelSpec) -> tuple[str, ...]:
    """Name the modules around missing weights; only a head and a pooler may be missing."""
    inside = [key for key in absent if key.startswith(f"{prefix}.")]
    lost = [key for key in inside if not key.startswith(f"{prefix}.pooler.")]
    if lost or (absent and spec.task in ("causal-lm", "seq2seq-lm")):
        raise RankFlowError(
            f"the checkpoint of '{spec.name}' lacks {len(lost or absent)} weights of the model, "
            f"e.g. {(lost or absent)[0]}: it is damaged, or another architecture's; choose another "
            "[model] name"
        )
    poolers = {f"{prefix}.pooler"} if inside else set()
    return tuple(sorted({key.split(".")[0] for key in absent if key not in inside} | poolers))


def _head_modules(model: PreTrainedModel, spec: ModelSpec) -> tuple[str, ...]:
    """Name what a classifier has beside its encoder."""
    if spec.task in ("causal-lm", "seq2seq-lm"):
        return ()
    return tuple(
        name
        for name, module in model.named_children()
        if name != model.base_model_prefix and any(True for _ in module.parameters())
    )
