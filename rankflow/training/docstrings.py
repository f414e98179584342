"""The built-in data set ``docstrings``: which subpackage does this docstring come from?

Every machine that runs RankFlow already holds a real text corpus: the docstrings of the standard
library, numpy, scipy and torch. They are read from the source files, which are parsed and never
imported. The class of a docstring is the public subpackage or module that it lives in
(``asyncio``, ``scipy.stats``, ``torch.nn``), and its text is the first paragraph without the words
that name the class.

The rows depend on the installed versions only. Selection, order and split follow from a SHA-256 of
each text, so that they are the same on every machine and adding a package moves no row of another
one from train to test.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import sys
import sysconfig
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from datasets import ClassLabel, Dataset, DatasetDict, DatasetInfo, Features, Value

from rankflow.errors import RankFlowError

PACKAGES = ("numpy", "scipy", "torch")
RULE_VERSION = 1
MIN_CHARACTERS = 20
MIN_ROWS = 100
MAX_ROWS = 400
SPLITS = ("train", "validation", "test")
_TEST_FOLDERS = frozenset({"test", "tests", "testing", "idle_test"})


@dataclass(frozen=True, slots=True)
class SourceTree:
    """A folder whose public children are classes.

    Attributes:
        package: Name put before each child's, empty for the standard library.
        folder: The folder that holds the children.
        children: Public subpackages and modules to read, sorted.
    """

    package: str
    folder: Path
    children: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """The rows of the data set before they become a ``DatasetDict``.

    Attributes:
        labels: Class names, sorted.
        texts: One first paragraph per row, ordered by its hash.
        classes: Index into ``labels`` of each row.
        splits: Index into ``SPLITS`` of each row.
        files: Source files read.
        skipped: Source files passed over because they are not UTF-8 or do not parse.
    """

    labels: list[str]
    texts: list[str]
    classes: list[int]
    splits: list[int]
    files: int
    skipped: int


def load_docstrings() -> DatasetDict:
    """Return the data set, from the user's cache or, the first time, from the source files.

    Returns:
        Splits ``train``, ``validation`` and ``test`` (8 : 1 : 1) with the columns ``text`` and
        ``label`` (a ``ClassLabel``).

    Raises:
        RankFlowError: The installed packages carry no source files to read.
    """
    path = cache_path()
    corpus = _read_cache(path)
    if corpus is None:
        corpus = collect_corpus(installed_trees())
        _write_cache(path, corpus)
    return to_dataset(corpus)


def installed_trees() -> tuple[SourceTree, ...]:
    """Locate the standard library and the packages, without importing anything."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    trees = [SourceTree("", stdlib, _public_children(stdlib, sys.stdlib_module_names))]
    for package in PACKAGES:
        found = importlib.util.find_spec(package)
        if found is not None and found.submodule_search_locations:
            folder = Path(found.submodule_search_locations[0])
            trees.append(SourceTree(package, folder, _public_children(folder)))
    return tuple(trees)


def _public_children(folder: Path, allowed: Iterable[str] | None = None) -> tuple[str, ...]:
    names = {
        p.name.removesuffix(".py") for p in folder.iterdir() if p.is_dir() or p.suffix == ".py"
    }
    public = {name for name in names if name.isidentifier() and not name.startswith("_")}
    return tuple(sorted(public if allowed is None else public.intersection(allowed)))


def collect_corpus(
    trees: Iterable[SourceTree], *, min_rows: int = MIN_ROWS, max_rows: int = MAX_ROWS
) -> Corpus:
    """Read the trees and select the rows.

    A text that occurs in two classes is dropped from both; a class with fewer than ``min_rows``
    texts is dropped; of one with more than ``max_rows`` those with the smallest hashes stay.

    Args:
        trees: Where to read.
        min_rows: Smallest class that is kept (rows).
        max_rows: Largest share of one class (rows).

    Raises:
        RankFlowError: Fewer than two classes remain.
    """
    counts: Counter[str] = Counter()
    by_class: dict[str, set[str]] = {}
    for tree in trees:
        for child in tree.children:
            label = ".".join(filter(None, (tree.package, child)))
            by_class[label] = set(_read_child(tree.folder, child, label, counts))
    occurrences = Counter(text.casefold() for texts in by_class.values() for text in texts)
    chosen: dict[str, str] = {}
    for label, texts in by_class.items():
        own = [text for text in texts if occurrences[text.casefold()] == 1]
        if len(own) >= min_rows:
            chosen |= dict.fromkeys(sorted(own, key=_digest)[:max_rows], label)
    labels = sorted(set(chosen.values()))
    if len(labels) < 2:
        raise RankFlowError(
            f"the data set 'docstrings' needs two classes of {min_rows} or more docstrings, but "
            f"{counts['files']} source files gave {len(labels)}: are the standard library, "
            f"{', '.join(PACKAGES)} installed with their .py files? Otherwise name files under "
            "[data] train, validation and test"
        )
    texts_in_order = sorted(chosen, key=_digest)
    return Corpus(
        labels=labels,
        texts=texts_in_order,
        classes=[labels.index(chosen[text]) for text in texts_in_order],
        splits=[_split(text) for text in texts_in_order],
        files=counts["files"],
        skipped=counts["skipped"],
    )


def to_dataset(corpus: Corpus) -> DatasetDict:
    """Turn the rows into in-memory splits with the columns ``text`` and ``label``."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=corpus.labels)})
    rows = list(zip(corpus.texts, corpus.classes, corpus.splits, strict=True))
    description = (
        f"{len(rows)} docstrings of {len(corpus.labels)} subpackages, read from {corpus.files} "
        f"source files ({corpus.skipped} unreadable ones skipped)"
    )
    return DatasetDict(
        {
            name: Dataset.from_dict(
                {
                    "text": [text for text, _, split in rows if split == index],
                    "label": [label for _, label, split in rows if split == index],
                },
                features=features,
                info=DatasetInfo(description=description, features=features),
            )
            for index, name in enumerate(SPLITS)
        }
    )


def cache_path() -> Path:
    """Where the rows are kept for these versions of the interpreter, the packages and the rule."""
    key = {
        "rule": [RULE_VERSION, MIN_CHARACTERS, MIN_ROWS, MAX_ROWS],
        "python": [sys.version, sysconfig.get_paths()["stdlib"]],
        **{package: importlib.metadata.version(package) for package in PACKAGES},
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "rankflow" / f"docstrings-{digest}.json"


def first_paragraph(docstring: str) -> str:
    """Return the first paragraph on one line.

    >>> first_paragraph('''Solve a system.
    ...     Exactly.
    ...
    ...     Parameters: ...''')
    'Solve a system. Exactly.'
    """
    return " ".join(re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0].split())


def strip_label(text: str, label: str) -> str:
    """Remove the words that name the class, whatever their case, so that they do not leak.

    >>> strip_label("Like numpy.linalg.norm, the NumPy way.", "numpy.linalg")
    'Like norm, the way.'
    """
    pieces = "|".join(map(re.escape, label.split(".")))
    without = re.sub(rf"(?i)(?<![a-z0-9])(?:{pieces})(?![a-z0-9])\.?", "", text)
    return " ".join(without.split())


def _read_child(folder: Path, child: str, label: str, counts: Counter[str]) -> Iterator[str]:
    for path in _source_files(folder, child):
        counts["files"] += 1
        tree = _parse(path)
        if tree is None:
            counts["skipped"] += 1
            continue
        for docstring in _docstrings(tree):
            text = strip_label(first_paragraph(docstring), label)
            if len(text) >= MIN_CHARACTERS:
                yield text


def _source_files(folder: Path, child: str) -> Iterator[Path]:
    module = folder / f"{child}.py"
    if module.is_file():
        yield module
    for path in sorted((folder / child).rglob("*.py")):
        inside = path.relative_to(folder)
        if _TEST_FOLDERS.isdisjoint(inside.parts) and not inside.name.startswith("test_"):
            yield path


def _parse(path: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        # Sources with invalid escapes warn when parsed; they are not ours to mend.
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_text(encoding="utf-8-sig"))
        except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError, OSError):
            return None


def _docstrings(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        docstring = ast.get_docstring(node, clean=False)
        if docstring is not None:
            yield docstring
    for child in ast.iter_child_nodes(node):
        # Definitions hide in statements only; passing over expressions halves the time.
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _docstrings(child)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def _split(text: str) -> int:
    # The order uses the first bytes of the digest, the split its last: they are independent.
    tenth = int.from_bytes(_digest(text)[-8:], "big") % 10
    return max(0, tenth - 7)


def _read_cache(path: Path) -> Corpus | None:
    try:
        corpus = Corpus(**json.loads(path.read_text(encoding="utf-8")))
        rows = len(corpus.texts)
        intact = rows == len(corpus.classes) == len(corpus.splits) and max(corpus.classes) < len(
            corpus.labels
        )
    except (OSError, ValueError, TypeError):
        return None
    return corpus if intact else None


def _write_cache(path: Path, corpus: Corpus) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=path.stem, delete=False
        ) as file:
            json.dump(asdict(corpus), file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"cannot cache the data set 'docstrings' in {path}: {error}", stacklevel=3)
