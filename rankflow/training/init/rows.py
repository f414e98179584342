"""Look at the first rows of a data set, and tell what kind of thing each column holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from datasets.exceptions import DatasetsError

from rankflow.errors import RankFlowError, SpecError
from rankflow.specs.run import BUILT_IN_DATA, FILE_TYPES
from rankflow.training.sources import open_source

COUNT: Final = 1_000  # rows that are looked at
_LONGEST_NAME: Final = 60  # characters; a longer string is no name of a class

Kind = Literal["text", "class", "number", "words", "tags", "messages", "other"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the first rows.

    Attributes:
        name: Its name.
        kind: What it holds: strings, whole numbers or booleans, other numbers, lists of strings,
            lists of whole numbers, conversations, or something else.
        values: Its values, without missing ones.
    """

    name: str
    kind: Kind
    values: tuple[Any, ...]

    @property
    def classes(self) -> int:
        """Number of different values; 0 where they are no single strings or numbers."""
        return len(set(self.values)) if self.kind in ("text", "class") else 0

    @property
    def has_classes(self) -> bool:
        """Whether few values come again and again, as names of classes do."""
        if not 2 <= self.classes <= len(self.values) / 4:
            return False
        return all(0 < len(str(value)) <= _LONGEST_NAME for value in self.values)


@dataclass(frozen=True, slots=True)
class FirstRows:
    """The first rows of a data set.

    Attributes:
        columns: Its columns.
        count: How many rows were looked at.
        splits: Names of its splits.
    """

    columns: tuple[Column, ...]
    count: int
    splits: tuple[str, ...]


def read_first_rows(data: str, config: str | None) -> FirstRows:
    """Read the first rows that a run would train on.

    Args:
        data: ``docstrings``, a file, or a hub id.
        config: Configuration of a hub id.

    Raises:
        SpecError: There is no such data set or file.
        RankFlowError: The rows cannot be read, or there are none.
    """
    is_file = Path(data).suffix in FILE_TYPES
    if is_file and not Path(data).is_file():
        raise SpecError(f"--data {data}: no such file")
    if config is not None and (is_file or data == BUILT_IN_DATA):
        raise SpecError(f"--config {config}: only a hub id has configurations; leave it out")
    if Path(data).exists() and not is_file:
        raise SpecError(f"--data {data}: it must end in one of {', '.join(FILE_TYPES)}")
    splits = open_source(data, config)
    try:
        rows = list(islice(splits["train"], COUNT))
    except (DatasetsError, ValueError, OSError) as error:
        raise RankFlowError(f"--data {data}: cannot be read: {error.__cause__ or error}") from error
    if not rows:
        raise RankFlowError(f"--data {data}: it has no rows")
    columns = tuple(describe(name, [row.get(name) for row in rows]) for name in rows[0])
    return FirstRows(columns, len(rows), tuple(splits))


def describe(name: str, values: Sequence[Any]) -> Column:
    """Tell what a column holds.

    >>> describe("label", [1, None, 0]).kind, describe("text", ["a", "b"]).kind
    ('class', 'text')
    """
    present = tuple(value for value in values if value is not None)
    kinds = {_kind(value) for value in present}
    if kinds == {"class", "number"}:
        kinds = {"number"}
    if len(kinds) > 1:  # an empty list is one of anything
        kinds -= {_kind([])}
    return Column(name, kinds.pop() if len(kinds) == 1 else "other", present)


def _kind(value: object) -> Kind:
    match value:
        case str():
            return "text"
        case int():
            return "class"
        case float():
            return "number"
        case [{"role": _}, *_]:
            return "messages"
        case [*items] if all(isinstance(item, str) for item in items):
            return "words"
        case [*items] if all(isinstance(item, int) for item in items):
            return "tags"
    return "other"
