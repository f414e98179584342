"""Write a run spec with the reasons for its choices, and what else could be set, beside them."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rankflow.specs.budget import BudgetSpec, is_path
from rankflow.specs.run import BUILT_IN_DATA, BUILT_IN_MODEL, FILE_TYPES
from rankflow.training.init.checkpoint import Checkpoint
from rankflow.training.init.choose import Reading
from rankflow.training.init.rows import FirstRows
from rankflow.training.init.settings import Settings
from rankflow.training.init.wishes import Wishes

_R: Final = 8
_ALPHA: Final = 16
_POOLINGS: Final = {
    "mean": 'of the tokens, into one vector a text; or "cls", or "model" for its own head',
    "cls": 'the first token stands for a text; or "mean", or "model" for its own head',
    "model": "the architecture's own head",
}
_COLUMNS: Final = {
    "text": "the input",
    "text_pair": "the second input",
    "label": "the class",
    "messages": "conversations; the model's chat template writes them as text",
    "target": "the output",
}


@dataclass(frozen=True, slots=True)
class Draft:
    """All that a run spec is written from.

    Attributes:
        wishes: What was asked for.
        model: What the model's files say.
        rows: What the data holds.
        reading: How it is read.
        settings: Sizes and rates.
        budget: The budget that was asked for.
    """

    wishes: Wishes
    model: Checkpoint
    rows: FirstRows
    reading: Reading
    settings: Settings
    budget: BudgetSpec


def write_spec(draft: Draft) -> str:
    """Return the run spec as TOML."""
    sections = (_head, _model, _data, _adapter, _budget, _train)
    return "\n".join("".join(f"{line}\n" for line in section(draft)) for section in sections)


def describe_model(model: Checkpoint) -> str:
    """Say in a few words what a model is."""
    article = "an" if model.family.startswith("e") else "a"
    size = "" if model.parameters is None else f" of {model.parameters:,} parameters"
    return f"{article} {model.family}{size}"


def _head(draft: Draft) -> Iterator[str]:
    yield "# Written by `rankflow init`: a starting point, with the reason for a choice behind it."
    yield "# A key behind a # is not set, and shows what else could be."
    yield ""
    yield _line("seed", 0, "of a new task head, the adapter, the order of rows, and the budget")


def _model(draft: Draft) -> Iterator[str]:
    wishes, model, reading = draft.wishes, draft.model, draft.reading
    is_local = wishes.model != BUILT_IN_MODEL and Path(wishes.model).is_dir()
    name = _beside(wishes.model, wishes) if is_local else wishes.model
    yield "[model]"
    yield _line("name", name, describe_model(model))
    yield _line("task", reading.task)
    if reading.task == "sequence-classification":
        yield _line("pooling", model.pooling, _POOLINGS[model.pooling])
    stored = model.dtype or "a type that the configuration does not name"
    yield _line("dtype", draft.settings.dtype, f"of the frozen weights, stored in {stored}")
    if wishes.chat_template is not None:
        template = _beside(wishes.chat_template, wishes)
        yield _line("chat_template", template, "saved with the adapter")
    elif "messages" in reading.columns:
        yield '# chat_template = "chat.jinja"  # in place of the tokenizer\'s own'
    yield '# attention = "sdpa"  # or "eager", or "flash_attention_2"'


def _data(draft: Draft) -> Iterator[str]:
    wishes, reading = draft.wishes, draft.reading
    is_file = Path(wishes.data).suffix in FILE_TYPES
    yield "[data]"
    if is_file:
        yield _line("train", _beside(wishes.data, wishes))
    else:
        yield _line("name", wishes.data, "built in" if wishes.data == BUILT_IN_DATA else "a hub id")
    if wishes.config is not None:
        yield _line("config", wishes.config)
    for key, column in reading.columns.items():
        yield _line(key, column.name, _describe_column(key, reading))
    if reading.unread:
        yield f"# Not read: {', '.join(reading.unread)}"
    if "messages" in reading.columns:
        yield '# loss_on = "all"  # learn what the others say too, not the assistant\'s turns alone'
    yield _line("max_length", draft.settings.max_length, _describe_length(draft))
    if "validation" not in draft.rows.splits:
        yield _line("validation_fraction", 0.1, "of the rows, held out to measure on")
    if is_file:
        yield '# validation = "FILE"  # in place of the fraction'
        yield '# test = "FILE"  # for the metrics at the end'
    yield "# max_train_rows = 1000  # drawn at random"


def _adapter(draft: Draft) -> Iterator[str]:
    shares_magnitudes = draft.budget.magnitude == "budgeted"
    yield "[adapter]  # keywords of peft.LoraConfig"
    if shares_magnitudes:
        yield _line("use_dora", True, "DoRA, whose magnitudes this budget shares out too")
    else:
        yield _line("use_dora", False, "true for DoRA; its magnitudes count within the budget")
    yield _line("r", _R, "with lora_alpha it sets the scale alone; the ranks are the budget's")
    yield _line(
        "lora_alpha", _ALPHA, f"the scale is lora_alpha / r = {_ALPHA / _R:g}, whatever the ranks"
    )
    yield _line("target_modules", "all-linear", 'or names, as in ["q_proj", "v_proj"]')
    yield "# lora_dropout = 0.05"


def _budget(draft: Draft) -> Iterator[str]:
    preset = draft.wishes.budget
    name = _beside(preset, draft.wishes) if is_path(preset) else preset
    yield "[budget]"
    yield _line("preset", name, draft.budget.description or None)
    yield _line("rank", draft.wishes.rank, "a budget: what plain LoRA of this rank would train")
    yield "# `rankflow budgets list` shows presets, `rankflow budgets show NAME` the keys of one."


def _train(draft: Draft) -> Iterator[str]:
    settings = draft.settings
    yield "[train]  # keywords of transformers.TrainingArguments"
    yield _line("num_train_epochs", 3, "or max_steps = 300")
    yield _line("per_device_train_batch_size", settings.batch, "a guess; more if memory allows")
    if settings.accumulation > 1:
        rows = settings.batch * settings.accumulation
        yield _line("gradient_accumulation_steps", settings.accumulation, f"{rows} rows a step")
    yield _line("per_device_eval_batch_size", settings.batch)
    reason = "a guess from the model's size, and what to tune first, by factors of 2"
    yield _line("learning_rate", settings.learning_rate, reason)
    yield _line("warmup_steps", 0.1, "of all steps")
    yield _line("lr_scheduler_type", "linear")
    yield _line("train_sampling_strategy", "group_by_length", "little padding")
    yield _line("save_strategy", "epoch", 'checkpoints to resume from; "no" for none')
    yield "# bf16 = true  # compute in bfloat16, where the device can"
    yield '# report_to = ["tensorboard", "wandb"]'


def _describe_column(key: str, reading: Reading) -> str:
    column = reading.columns[key]
    if key == "label":
        return f"{column.classes} classes in the first rows" if column.classes else "one a word"
    if key == "target" and reading.task == "causal-lm":
        return "the answer, which alone is learned"
    if key == "text" and reading.task == "causal-lm":
        return "the prompt" if "target" in reading.columns else "all of it is learned"
    if key == "text" and reading.task == "token-classification":
        return "words, one label for each"
    return _COLUMNS[key]


def _describe_length(draft: Draft) -> str:
    settings, columns = draft.settings, draft.reading.columns
    if "messages" in columns:
        fate = "longer conversations lose what comes behind"
    elif draft.reading.task != "causal-lm":
        fate = "longer texts are cut"
    elif "target" in columns:
        fate = "longer prompts lose their left, and an answer must fit"
    else:
        fate = "longer texts become several rows"
    return (
        f"tokens: {settings.covered:.1%} of the first {draft.rows.count:,} rows fit, of up to "
        f"{settings.longest:,}; {fate}"
    )


def _beside(path: str | Path, wishes: Wishes) -> str:
    """Return a path as the spec's folder sees it, since there relative paths begin."""
    if Path(path).expanduser().is_absolute():
        return str(path)
    return Path(os.path.relpath(path, wishes.output.parent)).as_posix()


def _line(key: str, value: str | float | bool, reason: str | None = None) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, float) else f"{value:g}"
    return f"{key} = {text}" if reason is None else f"{key} = {text}  # {reason}"
