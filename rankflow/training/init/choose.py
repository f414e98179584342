"""Choose what a model can learn from a data set's columns; a choice that is not clear is refused.

A task is possible if the model's family hosts it and the columns that it reads are clear. Where
exactly one is possible, it is chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rankflow.errors import SpecError
from rankflow.specs.reading import suggest
from rankflow.specs.run import Task
from rankflow.training.init.checkpoint import Family
from rankflow.training.init.rows import Column, Kind

_HOSTED: Final[Mapping[Family, tuple[Task, ...]]] = {
    "encoder": ("sequence-classification", "token-classification"),
    "decoder": ("causal-lm", "sequence-classification", "token-classification"),
    "encoder-decoder": ("seq2seq-lm", "sequence-classification"),
}
_LABELS: Final = ("label", "labels")
_WORDS: Final = ("text", "tokens", "words")
_WORD_LABELS: Final = (*_LABELS, "tags", "ner_tags")
# Inputs and outputs that data sets call so.
_PAIRS: Final = (
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("instruction", "response"),
    ("instruction", "output"),
    ("input", "output"),
    ("source", "target"),
    ("document", "summary"),
    ("article", "summary"),
    ("text", "summary"),
    ("text", "target"),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a data set is read.

    Attributes:
        task: What the model learns.
        columns: The columns read, by their key under ``[data]``.
        unread: Names of the other columns.
    """

    task: Task
    columns: Mapping[str, Column]
    unread: tuple[str, ...]


class _UnclearError(Exception):
    """The columns of a task are not there, or several would do; the message says which."""


def choose_reading(
    columns: Sequence[Column], family: Family, task: Task | None, asked: Mapping[str, str]
) -> Reading:
    """Choose a task and its columns.

    Args:
        columns: All columns of the data.
        family: The model's family.
        task: The task that was asked for; None for any that the model hosts.
        asked: Names of columns that were asked for, by their key.

    Raises:
        SpecError: A column is not there, no task is possible, or several are.
    """
    by_name = {column.name: column for column in columns}
    for key, name in asked.items():
        if name not in by_name:
            raise SpecError(
                f"--{key.replace('_', '-')} {name}: the data has no such column; "
                f"{suggest(name, by_name)}"
            )
    if task is not None and task not in _HOSTED[family]:
        raise SpecError(
            f"--task {task}: this model is of another family ({family}), which learns "
            + " or ".join(_HOSTED[family])
        )
    chosen = {key: by_name[name] for key, name in asked.items()}
    possible: dict[Task, Mapping[str, Column]] = {}
    hindered: list[str] = []
    for one in _HOSTED[family] if task is None else (task,):
        try:
            possible[one] = _read(one, columns, chosen)
        except _UnclearError as error:
            hindered.append(f"\n  {one}: {error}")
    if not possible:
        raise SpecError(
            f"it is not clear what this {family} is to learn from the columns ({_list(columns)})"
            + "".join(hindered)
        )
    if len(possible) > 1:
        raise SpecError(
            f"this {family} can learn several things from the columns ({_list(columns)}); add "
            + " or ".join(f"--task {one}" for one in possible)
        )
    ((found, read),) = possible.items()
    names = {column.name for column in read.values()}
    return Reading(found, read, tuple(name for name in by_name if name not in names))


def _read(
    task: Task, columns: Sequence[Column], asked: Mapping[str, Column]
) -> Mapping[str, Column]:
    kinds, read = _READERS[task]
    for key, column in asked.items():
        option = f"--{key.replace('_', '-')}"
        if key not in kinds:
            raise _UnclearError(f"it reads no {option}")
        if column.kind not in kinds[key]:
            wanted = " or ".join(_KINDS[kind] for kind in kinds[key])
            raise _UnclearError(f"{option} '{column.name}' holds {_tell(column)}, and not {wanted}")
    return read(columns, asked)


def _read_classes(columns: Sequence[Column], asked: Mapping[str, Column]) -> Mapping[str, Column]:
    label = asked.get("label") or _find_label(columns)
    if label.kind not in ("class", "text"):
        raise _UnclearError(f"'{label.name}' holds {_tell(label)}, not one class in each row")
    pair = asked.get("text_pair")
    texts = [c for c in columns if c.kind == "text" and c not in (label, pair)]
    text = asked.get("text") or _only(
        texts, ("text",), "texts", "--text COLUMN, and --text-pair COLUMN for a pair"
    )
    return {"text": text, "label": label} | ({} if pair is None else {"text_pair": pair})


def _find_label(columns: Sequence[Column]) -> Column:
    named = [c for c in columns if c.name in _LABELS]
    candidates = named if len(named) == 1 else [c for c in columns if c.has_classes]
    return _only(candidates, (), "classes", "--label COLUMN")


def _read_words(columns: Sequence[Column], asked: Mapping[str, Column]) -> Mapping[str, Column]:
    label = asked.get("label")
    words = asked.get("text") or _only(
        [c for c in columns if c.kind == "words" and c is not label and c.name not in _WORD_LABELS],
        _WORDS, "lists of words", "--text COLUMN",
    )  # fmt: skip
    lengths = [len(value) for value in words.values]
    labels = [
        c
        for c in columns
        if c.kind in ("words", "tags") and c is not words and list(map(len, c.values)) == lengths
    ]
    what = f"a label for each of '{words.name}'"
    return {"text": words, "label": label or _only(labels, _WORD_LABELS, what, "--label COLUMN")}


def _read_causal(columns: Sequence[Column], asked: Mapping[str, Column]) -> Mapping[str, Column]:
    chats = [c for c in columns if c.kind == "messages"]
    kinds = {c.kind for c in asked.values()} or {"messages" if chats else "text"}
    if len(kinds) > 1:
        raise _UnclearError("a row is texts or conversations, and not both")
    if "text" in kinds:
        return _read_texts(columns, asked, needs_target=False)
    if "messages" in asked:
        return {key: asked[key] for key in ("messages", "target") if key in asked}
    pair = _find_pair(chats)
    if pair is not None and "target" not in asked:
        return {"messages": pair[0], "target": pair[1]}
    rest = [c for c in chats if c is not asked.get("target")]
    messages = _only(
        rest,
        ("messages",),
        "conversations",
        "--messages COLUMN, and --target COLUMN if one answers the other",
    )
    return {"messages": messages} | ({"target": asked["target"]} if "target" in asked else {})


def _read_pairs(columns: Sequence[Column], asked: Mapping[str, Column]) -> Mapping[str, Column]:
    return _read_texts(columns, asked, needs_target=True)


def _read_texts(
    columns: Sequence[Column], asked: Mapping[str, Column], *, needs_target: bool
) -> Mapping[str, Column]:
    if "text" in asked and ("target" in asked or not needs_target):
        return {key: asked[key] for key in ("text", "target") if key in asked}
    texts = [c for c in columns if c.kind == "text" and c not in asked.values()]
    pair = _find_pair(texts)
    if pair is not None and not asked:
        return {"text": pair[0], "target": pair[1]}
    if "text" in asked:
        return {**asked, "target": _only(texts, ("target",), "texts", "--target COLUMN")}
    if "target" not in asked and needs_target:
        raise _UnclearError("no two columns are known as input and output; add --text and --target")
    text = _only(
        texts, ("text",), "texts", "--text COLUMN, and --target COLUMN if one answers the other"
    )
    return {"text": text, **asked}


def _find_pair(columns: Sequence[Column]) -> tuple[Column, Column] | None:
    """Return two columns that are known as input and output, if no other is as good as they."""
    by_name = {c.name: c for c in columns}
    for names in _PAIRS:
        if all(name in by_name for name in names):
            others = [c for c in columns if c.name not in names and not c.has_classes]
            return None if others else (by_name[names[0]], by_name[names[1]])
    return None


def _only(columns: Sequence[Column], names: Sequence[str], what: str, options: str) -> Column:
    """Return the only column, or the one of several that has a name to be expected."""
    if len(columns) == 1:
        return columns[0]
    if not columns:
        raise _UnclearError(f"no column holds {what}")
    named = [c for c in columns if c.name in names]
    if len(named) == 1:
        return named[0]
    found = ", ".join(f"'{c.name}'" for c in columns)
    raise _UnclearError(f"several columns hold {what}: {found}; add {options}")


def _list(columns: Sequence[Column]) -> str:
    return ", ".join(f"'{c.name}': {_tell(c)}" for c in columns)


def _tell(column: Column) -> str:
    if column.has_classes:
        return f"{column.classes} classes"
    return _KINDS[column.kind]


_KINDS: Final[Mapping[Kind, str]] = {
    "text": "texts",
    "class": "whole numbers",
    "number": "numbers",
    "words": "lists of words",
    "tags": "lists of whole numbers",
    "messages": "conversations",
    "other": "something else",
}
_Reader = Callable[[Sequence[Column], Mapping[str, Column]], Mapping[str, Column]]
_READERS: Final[Mapping[Task, tuple[Mapping[str, tuple[Kind, ...]], _Reader]]] = {
    "sequence-classification": (
        {"text": ("text",), "text_pair": ("text",), "label": ("class", "text")},
        _read_classes,
    ),
    "token-classification": ({"text": ("words",), "label": ("tags", "words")}, _read_words),
    "causal-lm": (
        {"text": ("text",), "messages": ("messages",), "target": ("text", "messages")},
        _read_causal,
    ),
    "seq2seq-lm": ({"text": ("text",), "target": ("text",)}, _read_pairs),
}
