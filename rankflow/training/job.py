"""From a run spec to everything that training needs, with every check before the first step."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from datasets import DatasetDict
from peft import PeftModel
from rich.console import Console
from transformers import PreTrainedTokenizerBase, TrainingArguments, set_seed

from rankflow.specs.run import ModelSpec, RunSpec
from rankflow.training.adapter import add_adapter, check_names
from rankflow.training.baseline import Baseline, fit_baseline
from rankflow.training.data import TaskData, load_data
from rankflow.training.head import start_head
from rankflow.training.models import BaseModel, build_meta_model, check_length, load_base_model
from rankflow.training.pooling import TokenPooling
from rankflow.training.run_budget import resolve_run_budget
from rankflow.training.tokens import IGNORED, Collator, make_collator, tokenize


@dataclass(frozen=True, slots=True)
class Job:
    """A run, ready to train.

    Attributes:
        data: The rows as text.
        splits: The rows as tokens.
        model: The model with its adapter.
        tokenizer: The model's tokenizer.
        collate: Pads rows into a batch.
        baseline: Metrics of the frozen encoder on the judged split; empty for language models,
            and where no rows are held out.
    """

    data: TaskData
    splits: DatasetDict
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    collate: Collator
    baseline: dict[str, float]


def prepare(spec: RunSpec, args: TrainingArguments, console: Console) -> Job:
    """Load data and model, fit the baseline, and put the adapter on.

    Args:
        spec: The run.
        args: Its training arguments.
        console: Where to draw.

    Raises:
        SpecError: The spec names something that does not exist or does not fit.
        BudgetError: The budget does not fit the sites or the steps.
        SiteError: The adapter cannot be steered.
        RankFlowError: Rows, checkpoint or tokenizer are not fit for the task.
    """
    with console.status("reading the rows"):
        data = load_data(spec.data, spec.model.task)
    console.print(f"data        {_describe_data(spec, data)}", highlight=False, soft_wrap=True)
    with console.status("loading the model"):
        set_seed(spec.seed)  # a new head and the adapter are drawn at random
        base, splits = load_model(spec, data)
    console.print(f"model       {_describe_model(spec, base)}", highlight=False, soft_wrap=True)
    for line in _describe_tokens(spec, data, splits):
        console.print(f"tokens      {line}", highlight=False, soft_wrap=True)
    collate = make_collator(base.tokenizer, spec.model.task)
    base.model.to(args.device)
    _check_budget(spec, args, data, splits)
    baseline: dict[str, float] = {}
    if data.labels:
        with console.status("fitting a head on the frozen encoder"):
            fitted = _fit(base, spec.model, data, splits, collate)
        baseline = fitted.metrics
        if reads_hidden_states(spec.model):
            start_head(base, fitted.head)
    model = add_adapter(base, spec.model, spec.adapter)
    return Job(data, splits, model, base.tokenizer, collate, baseline)


def _check_budget(
    spec: RunSpec, args: TrainingArguments, data: TaskData, splits: DatasetDict
) -> None:
    """Refuse an adapter or a budget that does not fit, before anything is fitted or written."""
    with torch.random.fork_rng(devices=[]):  # what the adapter draws here is not trained
        base = build_meta_model(spec.model, data.labels)
        model = add_adapter(base, spec.model, spec.adapter)
    check_names(model, spec.adapter)
    resolve_run_budget(spec.budget, model, splits["train"], args)


def load_model(spec: RunSpec, data: TaskData) -> tuple[BaseModel, DatasetDict]:
    """Load the base model under a head for the task, and return the rows in its tokens beside it.

    Raises:
        SpecError: There is no such model, or it does not fit the rows.
        RankFlowError: Rows, checkpoint or tokenizer are not fit for the task.
    """
    base = load_base_model(spec.model, data.labels)
    check_length(spec.data.max_length, base.model.config)
    splits = tokenize(
        data.splits, base.tokenizer, spec.model.task, spec.data.max_length, spec.data.loss_on
    )
    return base, splits


def reads_hidden_states(spec: ModelSpec) -> bool:
    """Whether the task head is a linear map of the encoder's last hidden states."""
    return spec.task == "token-classification" or spec.pooling != "model"


def _fit(
    base: BaseModel, spec: ModelSpec, data: TaskData, splits: DatasetDict, collate: Collator
) -> Baseline:
    pooling: TokenPooling | None = "cls" if spec.pooling == "cls" else "mean"
    if spec.task == "token-classification":
        pooling = None
    return fit_baseline(base.model, splits, data.judged_split, collate, pooling, len(data.labels))


def _describe_data(spec: RunSpec, data: TaskData) -> str:
    rows = ", ".join(f"{len(rows):,} {name}" for name, rows in data.splits.items())
    classes = f", {len(data.labels)} classes" if data.labels else ""
    return f"{spec.data.name or 'files'}: {rows} rows{classes}"


def _describe_model(spec: RunSpec, base: BaseModel) -> str:
    return f"{spec.model.name}: {base.model.num_parameters():,} parameters"


def _describe_tokens(spec: RunSpec, data: TaskData, splits: DatasetDict) -> Iterator[str]:
    """Tell how long rows are, and what of a conversation is learned and lost."""
    yield _describe_lengths(spec, splits)
    if spec.data.messages is None:
        return
    labels = [label for row in splits["train"]["labels"] for label in row]
    yield f"{sum(label != IGNORED for label in labels) / len(labels):.1%} of them are learned"
    for name, rows in splits.items():
        dropped = len(data.splits[name]) - len(rows)
        if dropped:
            yield (
                f"{dropped:,} {name} rows are dropped: what they have to learn begins behind "
                f"max_length = {spec.data.max_length}"
            )


def _describe_lengths(spec: RunSpec, splits: DatasetDict) -> str:
    limit = spec.data.max_length
    lengths = [len(ids) for ids in splits["train"]["input_ids"]]
    mean, full = sum(lengths) / len(lengths), sum(length == limit for length in lengths)
    fate = "cut"
    if spec.model.task == "causal-lm" and spec.data.messages is None:
        fate = "split" if spec.data.target is None else "cut from the left of their prompts"
    return f"{mean:.1f} in a training row; {full:,} rows fill all {limit}, longer texts are {fate}"
