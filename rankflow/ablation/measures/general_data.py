"""What a model could do before it was fine-tuned: the rows that show it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankflow.errors import RankFlowError, SpecError
from rankflow.specs.reading import suggest
from rankflow.training.data import draw_rows
from rankflow.training.sources import Split, load_files


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Pairs of texts, and how alike people found them.

    Attributes:
        first: One text of each pair.
        second: The other.
        scores: Higher is more alike, on any scale.
    """

    first: tuple[str, ...]
    second: tuple[str, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GeneralTexts:
    """Texts from outside the task."""

    texts: tuple[str, ...]


ForgettingData = ScoredPairs | GeneralTexts


def load_pairs(
    files: tuple[Path, ...], text: str, text_pair: str, score: str, max_rows: int | None = None
) -> ScoredPairs:
    """Read pairs of texts with their scores.

    Args:
        files: Files with the rows (jsonl, json, csv, parquet).
        text: Column with one text.
        text_pair: Column with the other.
        score: Column with the score.
        max_rows: Number of rows to use, drawn the same way every time; None for all.

    Raises:
        SpecError: There is no such column.
        RankFlowError: A file cannot be read, a row lacks a value, or nothing differs in score.
    """
    split = _load(files, max_rows)
    first, second = (
        _texts(split, role, column) for role, column in (("text", text), ("text_pair", text_pair))
    )
    scores = _scores(split, score)
    if len(set(scores)) < 2:
        raise RankFlowError(
            f"{split.origin}: column '{score}' has {len(set(scores))} different scores; a "
            "correlation needs at least two"
        )
    return ScoredPairs(first, second, scores)


def load_texts(files: tuple[Path, ...], text: str, max_rows: int | None = None) -> GeneralTexts:
    """Read texts.

    Args:
        files: Files with the rows (jsonl, json, csv, parquet).
        text: Column with the text.
        max_rows: Number of rows to use, drawn the same way every time; None for all.

    Raises:
        SpecError: There is no such column.
        RankFlowError: A file cannot be read, or a row lacks a text.
    """
    return GeneralTexts(_texts(_load(files, max_rows), "text", text))


def _texts(split: Split, role: str, column: str) -> tuple[str, ...]:
    values = _column(split, role, column)
    for row, value in enumerate(values, start=1):
        if not isinstance(value, str) or not value:
            raise RankFlowError(
                f"{split.origin}: row {row} has {value!r} in column '{column}'; [forgetting] "
                f"{role} needs a text in each row"
            )
    return tuple(values)


def _scores(split: Split, column: str) -> tuple[float, ...]:
    values = _column(split, "score", column)
    for row, value in enumerate(values, start=1):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value):
            raise RankFlowError(
                f"{split.origin}: row {row} has {value!r} in column '{column}'; [forgetting] "
                "score needs a number in each row"
            )
    return tuple(map(float, values))


def _column(split: Split, role: str, column: str) -> list[Any]:
    present = split.rows.column_names
    if column not in present:
        raise SpecError(
            f"[forgetting] {role} = '{column}': {split.origin} has no such column; "
            f"{suggest(column, present)}"
        )
    return list(split.rows[column])


def _load(files: tuple[Path, ...], max_rows: int | None) -> Split:
    split = load_files(files)
    return Split(draw_rows(split.rows, max_rows), split.origin)
