"""Where rows come from: the built-in data set, files, or a hub id."""

import codecs
import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, Json, List, Value, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetsError

from rankflow.errors import RankFlowError, SpecError, brief
from rankflow.specs.run import BUILT_IN_DATA, DataSpec
from rankflow.training.docstrings import load_docstrings

SPLITS = ("train", "validation", "test")
_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_BLOCK = 1 << 20  # bytes


@dataclass(frozen=True, slots=True)
class Split:
    """Rows, and where they came from in the words of an error message."""

    rows: Dataset
    origin: str


def load_sources(spec: DataSpec) -> dict[str, Split]:
    """Read the splits that the source has, columns untouched.

    Args:
        spec: A name, or files.

    Returns:
        ``train`` and, where they exist, ``validation`` and ``test``.

    Raises:
        SpecError: There is no such data set, or it has no split to train on.
        RankFlowError: A file is empty, not UTF-8, or not what its ending says.
    """
    if spec.name is None:
        return _load_files(spec)
    loaded = _load_named(spec.name, spec.config)
    return {
        name: Split(loaded[name], f"the data set '{spec.name}', split '{name}'")
        for name in SPLITS
        if name in loaded
    }


def open_source(name: str, config: str | None) -> Mapping[str, Iterable[dict[str, Any]]]:
    """Open the built-in rows, a file, or a data set of the hub, which is read as it is asked for.

    Args:
        name: ``docstrings``, a file, or a hub id.
        config: Configuration of a hub id.

    Returns:
        The rows by split.

    Raises:
        SpecError: There is no such data set, or it has no split to train on.
        RankFlowError: A file is empty, or not what its ending says.
    """
    if Path(name).suffix in _READERS:
        return {"train": _load_file(Path(name))}
    return _load_named(name, config, streaming=True)


def load_files(paths: tuple[Path, ...]) -> Split:
    """Read files into one split, columns untouched.

    Args:
        paths: Files that end in one of ``rankflow.specs.run.FILE_TYPES``, with the same columns.

    Raises:
        RankFlowError: A file is missing, empty, not UTF-8, or not what its ending says.
    """
    return Split(_join([_load_file(path) for path in paths], paths), _list(paths))


def tell_type(feature: object) -> str:
    """Say of what type a column is, in the words of an error message.

    >>> tell_type(Value("float64")), tell_type(List(Value("string"))), tell_type(Json())
    ('float64', 'lists of string', 'values of several types')
    """
    if isinstance(feature, Json):
        return "values of several types"
    if isinstance(feature, List):
        return f"lists of {tell_type(feature.feature)}"
    return feature.dtype if isinstance(feature, Value) else "tables"


def _load_files(spec: DataSpec) -> dict[str, Split]:
    files = {"train": spec.train, "validation": spec.validation, "test": spec.test}
    return {name: load_files(paths) for name, paths in files.items() if paths is not None}


def _load_named(name: str, config: str | None, *, streaming: bool = False) -> DatasetDict:
    loaded = load_docstrings() if name == BUILT_IN_DATA else _load_hub(name, config, streaming)
    if "train" not in loaded:
        raise SpecError(
            f"[data] name: the data set '{name}' has no split 'train', only "
            f"{', '.join(map(repr, loaded))}; export the rows to a file and name it under [data] "
            "train"
        )
    return loaded


def _load_file(path: Path) -> Dataset:
    reader = _READERS[path.suffix]
    try:
        if path.stat().st_size == 0:
            raise RankFlowError(f"{path}: the file is empty; write at least two rows into it")
        if reader != "parquet":
            _check_utf8(path)
        if reader == "csv":
            _check_header(path)
        return load_dataset(reader, data_files={"train": str(path)}, split="train")
    except (DatasetsError, ValueError, OSError) as error:
        cause = error.__cause__ or error
        if "no data" in str(cause):
            raise RankFlowError(f"{path}: no rows; write at least two into it") from error
        raise RankFlowError(
            f"{path}: cannot be read as {path.suffix[1:]}: {brief(cause)}; "
            "mend the file, or name another"
        ) from error


def _join(parts: list[Dataset], paths: tuple[Path, ...]) -> Dataset:
    try:
        return concatenate_datasets(parts)
    except ValueError as error:
        raise RankFlowError(
            f"{_list(paths)}: the files differ in the types of their columns: {brief(error)}; "
            "write a column as one type in all of them"
        ) from error


def _list(paths: tuple[Path, ...]) -> str:
    return ", ".join(map(str, paths))


def _load_hub(name: str, config: str | None, streaming: bool) -> DatasetDict:
    try:
        return load_dataset(name, config, streaming=streaming)
    except (DatasetsError, ValueError, OSError) as error:
        raise SpecError(
            f"[data] name: cannot load '{name}': {brief(error)}; the built-in data set is "
            f"'{BUILT_IN_DATA}', a hub id needs a connection or a filled cache, and files go under "
            "[data] train, validation and test"
        ) from error


def _check_utf8(path: Path) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            try:
                line += decoder.decode(block).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[: error.start].count(b"\n")
                encoding = "utf-16" if error.object.startswith(_UTF16_MARKS) else "latin1"
                raise RankFlowError(
                    f"{path}: line {line} is not UTF-8 ({error.reason}); convert the file, e.g. "
                    f"with `iconv -f {encoding} -t utf-8`"
                ) from error


def _check_header(path: Path) -> None:
    """Refuse a heading that stands over two columns, the second of which would be renamed."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    for column in header:
        if header.count(column) > 1:
            raise RankFlowError(
                f"{path}: {header.count(column)} columns are called '{column}'; give each a name "
                "of its own"
            )
