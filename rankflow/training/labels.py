"""From the label values of a source to class indices that mean the same in every split."""

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import ClassLabel, List, Value

from rankflow.errors import RankFlowError
from rankflow.specs.reading import suggest
from rankflow.training.sources import Split


def encode_labels(
    splits: Mapping[str, Split], column: str
) -> tuple[dict[str, Split], tuple[str, ...]]:
    """Replace label values by class indices; the classes are those of the training rows.

    Args:
        splits: Rows with a column ``label``: one label, or a list with a label for each word.
        column: What the source calls that column, for messages.

    Returns:
        The splits with whole-number labels, and the class names by index.

    Raises:
        RankFlowError: The labels are not classes, one is missing or does not occur in training,
            or there is one class only.
    """
    values = {name: list(split.rows["label"]) for name, split in splits.items()}
    for name, split in splits.items():
        _check_are_classes(split, values[name], column)
    train = splits["train"]
    classes = tuple(_name(value, train) for value in sorted(set(_flatten(values["train"]))))
    if len(classes) < 2:
        raise RankFlowError(
            f"{train.origin}: column '{column}' holds one class only ({', '.join(classes)}); "
            "a classifier needs two"
        )
    index = {label: position for position, label in enumerate(classes)}
    return {
        name: _encode(split, values[name], index, column) for name, split in splits.items()
    }, classes


def _check_are_classes(split: Split, values: list[Any], column: str) -> None:
    kind = _leaf(split)
    if isinstance(kind, Value) and kind.dtype.startswith(("float", "double")):
        raise RankFlowError(
            f"{split.origin}: column '{column}' holds numbers ({kind.dtype}), not classes; write "
            "the classes as strings or whole numbers"
        )
    for row, value in enumerate(values, start=1):
        # The hub marks the hidden labels of a test split by -1.
        if any(v is None or (isinstance(kind, ClassLabel) and v < 0) for v in _flatten([value])):
            raise RankFlowError(
                f"{split.origin}: row {row} has no label in column '{column}'; remove such rows, "
                "or name a labelled file instead"
            )


def _encode(split: Split, values: list[Any], index: Mapping[str, int], column: str) -> Split:
    for row, value in enumerate(values, start=1):
        for label in _flatten([value]):
            if _name(label, split) not in index:
                raise RankFlowError(
                    f"{split.origin}: row {row} has the label '{_name(label, split)}' in column "
                    f"'{column}', which no training row has; "
                    f"{suggest(_name(label, split), index)}"
                )
    encoded = [_encode_one(value, split, index) for value in values]
    return Split(split.rows.remove_columns("label").add_column("label", encoded), split.origin)


def _encode_one(value: Any, split: Split, index: Mapping[str, int]) -> int | list[int]:
    if isinstance(value, list):
        return [index[_name(label, split)] for label in value]
    return index[_name(value, split)]


def _leaf(split: Split) -> ClassLabel | Value:
    feature = split.rows.features["label"]
    return feature.feature if isinstance(feature, List) else feature


def _name(value: Any, split: Split) -> str:
    leaf = _leaf(split)
    return leaf.names[value] if isinstance(leaf, ClassLabel) else str(value)


def _flatten(values: list[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from value
        else:
            yield value
