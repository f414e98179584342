"""The tasks of an ablation: what is trained on, and how a model is judged."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import numpy as np
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, default_data_collator

from rankflow.ablation.bases import load_base
from rankflow.ablation.measures.forgetting import measure_forgetting
from rankflow.ablation.measures.general_data import (
    ForgettingData,
    ScoredPairs,
    load_pairs,
    load_texts,
)
from rankflow.ablation.measures.modes import evaluating
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.planted import (
    Design,
    PlantedModel,
    PlantedRows,
    excess_share,
    magnitude_recovery,
    plant,
    rank_recovery,
)
from rankflow.ablation.records import Forgetting, RankHistory
from rankflow.errors import SpecError
from rankflow.specs.ablation_task import ForgettingSpec, TaskSpec, TeacherSpec
from rankflow.specs.run import DataSpec, ModelSpec
from rankflow.training.data import load_data
from rankflow.training.metrics import classification_metrics
from rankflow.training.models import BaseModel, build_meta_model, check_length
from rankflow.training.pooling import TokenPooling, pool
from rankflow.training.quiet import quiet_libraries
from rankflow.training.tokens import IGNORED, Collator, make_collator, tokenize

_BATCH: Final = 64  # rows of an evaluation

Autocast = Callable[[], AbstractContextManager[Any]]


class Workload(Protocol):
    """A task that is ready: rows, a base model, and a judge."""

    @property
    def model(self) -> ModelSpec | None:
        """The base model's spec; None for the planted teacher."""

    @property
    def collate(self) -> Collator:
        """Pads rows into a batch."""

    @property
    def pooling(self) -> TokenPooling | None:
        """How the logits of a text's tokens become one row; None if the model's loss counts."""

    def rows(self, seed: int) -> Any:
        """Return the training rows of a seed."""

    def load_base(self, seed: int, *, quantised: bool) -> BaseModel:
        """Load the base model; what is new in it is drawn from torch's generator."""

    def build_meta(self) -> BaseModel:
        """Build the base model without numbers."""

    def sample(self, seed: int) -> dict[str, Tensor]:
        """Return one batch of the size of training."""

    def judge(self, model: nn.Module, split: str, autocast: Autocast) -> dict[str, float]:
        """Measure a trained model on a split."""

    def judge_ranks(self, ranks: RankHistory | None, seed: int) -> dict[str, float]:
        """Compare the learned ranks with the true ones, where these are known."""

    def measure_forgetting(self, model: nn.Module, autocast: Autocast) -> Forgetting | None:
        """Measure what the base model could do, before and after; None if nothing is to be."""


def open_workload(task: TaskSpec) -> Workload:
    """Read, check and tokenise what a task needs.

    Raises:
        SpecError: The spec names something that does not exist or does not fit.
        RankFlowError: Rows, checkpoint or tokenizer are not fit for the task.
    """
    batch = task.train.get("per_device_train_batch_size", 8)
    if task.teacher is not None:
        return PlantedWorkload(task.teacher, batch)
    assert task.model is not None  # the spec sees to it
    assert task.data is not None
    return _open_texts(task, task.model, task.data, batch)


@dataclass(frozen=True, slots=True)
class Memory:
    """What shows whether a model forgets.

    Attributes:
        data: The rows.
        tokenizer: The model's tokenizer.
        max_length: Longest text, in tokens.
        before: What the base model reaches, once it has been measured.
    """

    data: ForgettingData
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    before: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TextWorkload:
    """A model of transformers, and tokenised rows.

    Attributes:
        model: The base model's spec.
        splits: The rows as tokens.
        labels: Class names by index; empty for language models.
        has_targets: Whether the rows of a language model are prompts with targets.
        collate: Pads rows into a batch.
        batch: Rows of a training batch.
        memory: What shows whether the model forgets; None for nothing.
    """

    model: ModelSpec
    splits: DatasetDict
    labels: tuple[str, ...]
    has_targets: bool
    collate: Collator
    batch: int
    memory: Memory | None

    @property
    def pooling(self) -> TokenPooling | None:
        """Mean or first token, where a token classifier hosts the task."""
        if self.model.task != "sequence-classification" or self.model.pooling == "model":
            return None
        return self.model.pooling

    def rows(self, seed: int) -> Dataset:
        """Return the training rows, the same for every seed; the Trainer shuffles them."""
        return self.splits["train"]

    def load_base(self, seed: int, *, quantised: bool) -> BaseModel:
        """Load the pretrained weights; a new head is drawn from torch's generator."""
        with quiet_libraries():
            return load_base(self.model, self.labels, quantised=quantised)

    def build_meta(self) -> BaseModel:
        """Build the base model without numbers."""
        with quiet_libraries():
            return build_meta_model(self.model, self.labels)

    def sample(self, seed: int) -> dict[str, Tensor]:
        """Return the batch of the training rows of median length."""
        order = _by_length(self.splits["train"])
        middle = max(0, len(order) // 2 - self.batch // 2)
        rows = self.splits["train"].select(order[middle : middle + self.batch])
        return dict(self.collate(list(rows)))

    def judge(self, model: nn.Module, split: str, autocast: Autocast) -> dict[str, float]:
        """Return accuracy and nll of a classifier, nll and perplexity of a language model.

        Every token counts alike, whatever its batch. Tokens after virtual ones are judged as
        without them: the first token of a row is never a prediction.

        With targets only their tokens count, the end token included, and there is an accuracy: the
        share of rows at which each of these tokens is the likeliest one after the true ones before
        it. That is, up to rounding, the exact match of greedy decoding, whose tokens are the true
        ones up to where it first goes wrong; nothing has to be generated.
        """
        rows = self.splits[split]
        with evaluating(model), autocast():
            if self.labels:
                return _judge_classes(model, self._batches(rows, model), self.pooling)
            found = _judge_tokens(model, self._batches(rows, model))
        return found if self.has_targets else {k: v for k, v in found.items() if k != "accuracy"}

    def judge_ranks(self, ranks: RankHistory | None, seed: int) -> dict[str, float]:
        """Nobody knows the true ranks."""
        return {}

    def measure_forgetting(self, model: nn.Module, autocast: Autocast) -> Forgetting | None:
        """Measure similarity of an encoder, perplexity of a language model, before and after."""
        memory = self.memory
        if memory is None:
            return None

        def measure(measured: nn.Module) -> float:
            pooling: TokenPooling = "cls" if self.model.pooling == "cls" else "mean"
            with autocast():
                return measure_forgetting(
                    measured,
                    memory.data,
                    memory.tokenizer,
                    pooling=pooling,
                    max_length=memory.max_length,
                )

        if not memory.before:
            device = next(model.parameters()).device
            memory.before.append(measure(self.load_base(0, quantised=False).model.to(device)))
        name = "similarity" if isinstance(memory.data, ScoredPairs) else "perplexity"
        return Forgetting(name, memory.before[0], measure(model))

    def _batches(self, rows: Dataset, model: nn.Module) -> Iterator[dict[str, Tensor]]:
        device = next(model.parameters()).device
        ordered = rows.select(_by_length(rows))
        for batch in DataLoader(ordered, batch_size=_BATCH, collate_fn=self.collate):
            yield {key: value.to(device) for key, value in batch.items()}


def _open_texts(task: TaskSpec, model: ModelSpec, data: DataSpec, batch: int) -> TextWorkload:
    with quiet_libraries():
        loaded = load_data(data, model.task)
        for split in ("validation", "test"):
            if split not in loaded.splits:
                raise SpecError(
                    f"[tasks.{task.name}.data] has no {split} rows; an ablation tunes on the "
                    "validation split and reports the test split: name files for both"
                )
        base = build_meta_model(model, loaded.labels)
        check_length(data.max_length, base.model.config)
        splits = tokenize(loaded.splits, base.tokenizer, model.task, data.max_length, data.loss_on)
        collate = make_collator(base.tokenizer, model.task)
        memory = _open_memory(task.forgetting, model, base.tokenizer)
    has_targets = model.task == "causal-lm" and data.target is not None
    return TextWorkload(model, splits, loaded.labels, has_targets, collate, batch, memory)


def _open_memory(
    spec: ForgettingSpec | None, model: ModelSpec, tokenizer: PreTrainedTokenizerBase
) -> Memory | None:
    if spec is None:
        return None
    data: ForgettingData
    if model.task == "causal-lm":
        data = load_texts(spec.data, spec.text, spec.max_rows)
    else:
        data = load_pairs(spec.data, spec.text, spec.text_pair, spec.score, spec.max_rows)
    return Memory(data, tokenizer, spec.max_length)


@dataclass(frozen=True, slots=True)
class PlantedWorkload:
    """The planted teacher; every seed is another problem.

    Attributes:
        teacher: What the spec says of it.
        batch: Rows of a training batch.
    """

    teacher: TeacherSpec
    batch: int

    @property
    def model(self) -> None:
        """It is no model of transformers."""
        return

    @property
    def collate(self) -> Collator:
        """Stack the rows."""
        return default_data_collator

    @property
    def pooling(self) -> None:
        """Its own loss counts."""
        return

    def rows(self, seed: int) -> PlantedRows:
        """Return rows of the seed's problem, none of which comes twice."""
        return PlantedRows(plant(seed, self._design), range(self.teacher.rows))

    def load_base(self, seed: int, *, quantised: bool) -> BaseModel:
        """Return the seed's layers before they have learned anything.

        Raises:
            UnsupportedError: They are to be in 4 bits.
        """
        if quantised:
            raise UnsupportedError("the planted teacher's layers are not stored in 4 bits")
        return BaseModel(PlantedModel(plant(seed, self._design)), None, (), ())

    def build_meta(self) -> BaseModel:
        """Return the layers without numbers."""
        base = self.load_base(0, quantised=False)
        return BaseModel(base.model.to("meta"), None, (), ())

    def sample(self, seed: int) -> dict[str, Tensor]:
        """Return the first rows of a problem."""
        return dict(self.collate(self.rows(seed).__getitems__(range(self.batch))))

    def judge(self, model: nn.Module, split: str, autocast: Autocast) -> dict[str, float]:
        """Return the share of the excess loss that is left, exactly, whatever the split."""
        return {"excess": excess_share(model)}

    def judge_ranks(self, ranks: RankHistory | None, seed: int) -> dict[str, float]:
        """Return Spearman's correlation of learned and true ranks, and how magnitudes fit.

        Equal ranks have no correlation with anything, and methods without magnitudes no fit.
        """
        if ranks is None:
            return {}
        last, design = ranks.moments[-1], self._design
        learned = dict(zip(ranks.sites, last.ranks, strict=True))
        recovery = rank_recovery(learned, design.true_ranks)
        found = {} if math.isnan(recovery) else {"rank_spearman": recovery}
        if last.magnitudes:
            on = [ranks.sites[i] for i in last.magnitudes]
            fit = magnitude_recovery(on, design.true_magnitudes)
            found |= {"magnitude_precision": fit.precision, "magnitude_recall": fit.recall}
        return found

    def measure_forgetting(self, model: nn.Module, autocast: Autocast) -> None:
        """It could do nothing before."""
        return

    @property
    def _design(self) -> Design:
        return Design(noise=self.teacher.noise)


def _judge_classes(
    model: nn.Module, batches: Iterator[dict[str, Tensor]], pooling: TokenPooling | None
) -> dict[str, float]:
    logits, labels = [], []
    for batch in batches:
        targets = batch.pop("labels")
        found = model(**batch).logits
        if pooling is not None:
            found = pool(found, batch["attention_mask"], pooling)  # (batch, classes)
        known = targets != IGNORED
        logits.append(found[known].float().cpu())
        labels.append(targets[known].cpu())
    return classification_metrics(torch.cat(logits).numpy(), torch.cat(labels).numpy())


def _judge_tokens(model: nn.Module, batches: Iterator[dict[str, Tensor]]) -> dict[str, float]:
    total, tokens, exact, rows = 0.0, 0, 0, 0
    for batch in batches:
        labels = batch.pop("labels")[:, 1:]
        known = labels != IGNORED
        logits = model(**batch).logits
        # Only what is judged: a prompt's logits over a vocabulary would fill memory in float32.
        found = logits[:, logits.shape[1] - labels.shape[1] - 1 : -1][known].float()  # (tokens, V)
        total += functional.cross_entropy(found, labels[known], reduction="sum").item()
        tokens += len(found)
        missed = known.nonzero()[found.argmax(dim=1) != labels[known], 0]  # the row of each
        exact += len(labels) - len(missed.unique())
        rows += len(labels)
    nll = total / tokens
    return {"nll": nll, "perplexity": math.exp(min(nll, 700.0)), "accuracy": exact / rows}


def _by_length(rows: Dataset) -> np.ndarray:
    return np.argsort([len(ids) for ids in rows["input_ids"]], kind="stable")


def autocast_of(arguments: Mapping[str, Any], device: torch.device) -> Autocast:
    """Return the precision in which the Trainer computes, for what is computed beside it.

    Casts are not cached: torch caches those of trainable weights alone, and a base whose weights
    are frozen would look slower than one whose are not.
    """
    for key, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if arguments.get(key):
            return partial(torch.autocast, device.type, dtype, cache_enabled=False)
    return nullcontext
