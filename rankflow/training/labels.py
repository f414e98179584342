"""From the label values of a source to class indices that mean the same in every split."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from datasets import ClassLabel, List, Value

from rankflow.errors import RankFlowError
from rankflow.specs.reading import suggest
from rankflow.training.sources import Split, tell_type

_CLASS_TYPES = ("string", "large_string", "bool", "int", "uint", "null")


def encode_labels(
    splits: Mapping[str, Split], column: str, *, words: bool
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Replace label values by class indices; the classes are those of the training rows.

    Args:
        splits: Rows with a column ``label``: one label, or a list with a label for each word.
        column: What the source calls that column, for messages.
        words: Whether each row has a list of labels.

    Returns:
        The splits with whole-number labels, and the class names by index.

    Raises:
        RankFlowError: The labels are not classes, one is missing or does not occur in training,
            there is one class only, or as many as labels, or two are hardly told apart.
    """
    values = {name: list(split.rows["label"]) for name, split in splits.items()}
    for name, split in splits.items():
        _check_type(split, column, words=words)
        _check_none_is_absent(split, values[name], column)
    train = splits["train"]
    classes = tuple(_name_all(sorted(set(_flatten(values["train"]))), train))
    if len(classes) < 2:
        raise RankFlowError(
            f"{train.origin}: column '{column}' holds one class only ({', '.join(classes)}); "
            "a classifier needs two"
        )
    _check_classes(classes, sum(1 for _ in _flatten(values["train"])), train, column)
    index = {label: position for position, label in enumerate(classes)}
    encoded = {}
    for name, split in splits.items():
        labels = _name_all(values[name], split)
        _check_known(split, labels, index, column)
        rows = split.rows.remove_columns("label").add_column("label", _look_up(labels, index))
        encoded[name] = Split(rows, split.origin)
    return encoded, classes


def _check_type(split: Split, column: str, *, words: bool) -> None:
    feature, kind = split.rows.features["label"], _leaf(split)
    is_class = isinstance(kind, ClassLabel) or (
        isinstance(kind, Value) and kind.dtype.startswith(_CLASS_TYPES)
    )
    if not is_class or isinstance(feature, List) != words:
        raise RankFlowError(
            f"{split.origin}: column '{column}' holds {tell_type(feature)}, not "
            f"{'lists of classes' if words else 'classes'}; write the classes as strings or whole "
            "numbers, all of one type"
        )


def _check_none_is_absent(split: Split, values: Sequence[Any], column: str) -> None:
    kind = _leaf(split)
    # The hub marks the hidden labels of a test split by -1.
    absent = (None, -1) if isinstance(kind, ClassLabel) else (None, "")
    for row, value in enumerate(values, start=1):
        if any(label in absent for label in _flatten([value])):
            raise RankFlowError(
                f"{split.origin}: row {row} has no label in column '{column}'; remove such rows, "
                "or name a labelled file instead"
            )


def _check_classes(classes: Sequence[str], labels: int, train: Split, column: str) -> None:
    """Refuse classes of which nothing can be learned, or that are one by mistake."""
    if len(classes) == labels > 2:
        raise RankFlowError(
            f"{train.origin}: no two labels in column '{column}' are the same; is it the column of "
            "the classes? Name another under [data] label"
        )
    stripped = [label.strip() for label in classes]
    for label, bare in zip(classes, stripped, strict=True):
        if stripped.count(bare) > 1:
            raise RankFlowError(
                f"{train.origin}: column '{column}' holds the class {label!r} and another that "
                "differs in spaces only; write them alike"
            )


def _check_known(
    split: Split, labels: Sequence[Any], index: Mapping[str, int], column: str
) -> None:
    for row, value in enumerate(labels, start=1):
        for label in _flatten([value]):
            if label not in index:
                raise RankFlowError(
                    f"{split.origin}: row {row} has the label '{label}' in column '{column}', "
                    f"which no training row has; {suggest(label, index)}"
                )


def _name_all(values: Sequence[Any], split: Split) -> list[Any]:
    """Turn label values into class names, in lists where they are in lists."""
    kind = _leaf(split)
    names = kind.names if isinstance(kind, ClassLabel) else None

    def name(value: Any) -> Any:
        if isinstance(value, list):
            return [name(label) for label in value]
        return str(value) if names is None else names[value]

    return [name(value) for value in values]


def _look_up(labels: Sequence[Any], index: Mapping[str, int]) -> list[Any]:
    return [
        [index[word] for word in label] if isinstance(label, list) else index[label]
        for label in labels
    ]


def _leaf(split: Split) -> Any:
    feature = split.rows.features["label"]
    return feature.feature if isinstance(feature, List) else feature


def _flatten(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value
