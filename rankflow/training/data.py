"""The rows of a run, checked before the first step.

Whatever the source, the rows come out under the same column names, so that nothing after this file
knows where they came from:

=======================  ================================================================
task                     columns
=======================  ================================================================
sequence-classification  ``text``, ``text_pair`` if asked for, and ``label``
token-classification     ``text`` (words) and ``label`` (one for each word)
causal-lm                ``text``, and ``target`` if asked for; or ``messages``, and ``target``
                         if asked for, both of them lists of messages
seq2seq-lm               ``text`` and ``target``
=======================  ================================================================
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from datasets import Dataset, DatasetDict, List, Value

from rankflow.errors import RankFlowError, SpecError
from rankflow.specs.reading import suggest
from rankflow.specs.run import DataSpec, Task
from rankflow.training.labels import encode_labels
from rankflow.training.messages import check_messages
from rankflow.training.sources import Split, load_sources, tell_type

# Fixed, and not the training seed: runs that differ in their seed must share their rows.
_ROW_SEED = 0


@dataclass(frozen=True, slots=True)
class TaskData:
    """The checked rows of a run.

    Attributes:
        splits: ``train`` and, where they exist, ``validation`` and ``test``.
        labels: Class names by index; empty for language models.
    """

    splits: DatasetDict
    labels: tuple[str, ...]

    @property
    def judged_split(self) -> str | None:
        """The split that the finished model is judged on; None where no rows are held out."""
        return next((name for name in ("test", "validation") if name in self.splits), None)


def load_data(spec: DataSpec, task: Task) -> TaskData:
    """Read, check and split the rows.

    Args:
        spec: Where the rows are, and what their columns are called.
        task: What the model learns; it decides the columns.

    Raises:
        SpecError: A file, a data set or a column does not exist.
        RankFlowError: The rows are not fit for the task.
    """
    columns = columns_of(spec, task)
    splits = {name: _pick_columns(split, columns) for name, split in load_sources(spec).items()}
    words = task == "token-classification"
    for split in splits.values():
        _check_rows(split, columns, spec, words=words)
    if len(splits["train"].rows) < 2:
        raise RankFlowError(f"{splits['train'].origin}: one row only; training needs at least two")
    labels: tuple[str, ...] = ()
    if "label" in columns:
        splits, labels = encode_labels(splits, columns["label"], words=words)
    rows = _with_validation({name: split.rows for name, split in splits.items()}, spec)
    limits = {"train": spec.max_train_rows}
    drawn = {
        name: draw_rows(rows[name], limits.get(name, spec.max_eval_rows))
        for name in ("train", "validation", "test")
        if name in rows
    }
    _check_remainder(splits["train"], drawn["train"], spec)
    return TaskData(DatasetDict(drawn), labels)


def columns_of(spec: DataSpec, task: Task) -> dict[str, str]:
    """Return the source's name of each column that the task reads."""
    if task in ("causal-lm", "seq2seq-lm"):
        source = {"text": spec.text} if spec.messages is None else {"messages": spec.messages}
        return source | ({"target": spec.target} if spec.target is not None else {})
    columns = {"text": spec.text, "label": spec.label}
    if spec.text_pair is not None and task == "sequence-classification":
        columns["text_pair"] = spec.text_pair
    return columns


def _pick_columns(split: Split, columns: Mapping[str, str]) -> Split:
    present = split.rows.column_names
    for role, column in columns.items():
        if column not in present:
            raise SpecError(
                f"[data] {role} = '{column}': {split.origin} has no such column; "
                f"{suggest(column, present)} It has {', '.join(map(repr, present))}"
            )
    picked = split.rows.select_columns(list(columns.values()))
    return Split(picked.rename_columns({c: role for role, c in columns.items()}), split.origin)


def _check_rows(split: Split, columns: Mapping[str, str], spec: DataSpec, *, words: bool) -> None:
    if len(split.rows) == 0:
        raise RankFlowError(f"{split.origin}: no rows; leave the split out or fill it")
    if spec.messages is not None:
        check_messages(split, columns, spec.loss_on)
        return
    for role in set(columns) - {"label"}:
        _check_strings(split, role, columns[role], words=words)
    if words:
        _check_lengths(split, columns)


def _check_strings(split: Split, role: str, column: str, *, words: bool) -> None:
    feature = split.rows.features[role]
    inner = feature.feature if words and isinstance(feature, List) else feature
    fits = isinstance(feature, List) == words and isinstance(inner, Value)
    if not fits or inner.dtype not in ("string", "large_string", "null"):
        expected = "a list of words in each row" if words else "strings"
        if isinstance(feature, List) and not words:
            expected += "; lists of messages go under [data] messages"
        raise RankFlowError(
            f"{split.origin}: column '{column}' holds {tell_type(feature)}; [data] {role} needs "
            f"{expected}"
        )
    for row, value in enumerate(split.rows[role], start=1):
        if value is None or (words and None in value):
            raise RankFlowError(
                f"{split.origin}: row {row} has no text in column '{column}'; remove such rows"
            )
    if not any(" ".join(value).strip() if words else value.strip() for value in split.rows[role]):
        raise RankFlowError(
            f"{split.origin}: column '{column}' is empty in all rows; name another under [data] "
            f"{role}"
        )


def _check_lengths(split: Split, columns: Mapping[str, str]) -> None:
    pairs = zip(split.rows["text"], split.rows["label"], strict=True)
    for row, (words, labels) in enumerate(pairs, start=1):
        received = len(labels) if isinstance(labels, list) else "no list of"
        if received != len(words):
            raise RankFlowError(
                f"{split.origin}: row {row} has {len(words)} words in column '{columns['text']}' "
                f"and {received} labels in column '{columns['label']}'; each word needs one label"
            )


def _check_remainder(source: Split, train: Dataset, spec: DataSpec) -> None:
    """Refuse to train on what cannot be learned from, after some rows were held out or left out."""
    labels = train["label"] if "label" in train.column_names else None
    if len(train) < 2 or (labels is not None and not _differ(labels)):
        raise RankFlowError(
            f"{source.origin}: of {len(source.rows)} rows {len(train)} are left to train on, and "
            f"at least two are needed{' that differ in their class' if labels else ''}; add rows, "
            f"or change [data] validation_fraction = {spec.validation_fraction} or max_train_rows "
            f"= {spec.max_train_rows}"
        )


def _differ(labels: Iterable[int | list[int]]) -> bool:
    """Whether there are two classes among the labels, of texts or of words."""
    return len({c for label in labels for c in (label if isinstance(label, list) else [label])}) > 1


def _with_validation(rows: dict[str, Dataset], spec: DataSpec) -> dict[str, Dataset]:
    if "validation" in rows or spec.validation_fraction == 0:
        return rows
    train = rows["train"]
    count = min(max(1, round(len(train) * spec.validation_fraction)), len(train) - 1)
    order = np.random.default_rng(_ROW_SEED).permutation(len(train))
    return rows | {
        "validation": train.select(np.sort(order[:count])),
        "train": train.select(np.sort(order[count:])),
    }


def draw_rows(rows: Dataset, limit: int | None) -> Dataset:
    """Return at most so many rows, the same ones every time and in their order."""
    if limit is None or limit >= len(rows):
        return rows
    order = np.random.default_rng(_ROW_SEED).permutation(len(rows))
    return rows.select(np.sort(order[:limit]))
