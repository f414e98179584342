"""JSON from files that anybody may have written: strict, shallow, and of a bounded size.

Python's own reader keeps the last of two equal keys, takes ``NaN`` and ``1e999`` for numbers, and
makes fifty bytes of objects out of two bytes of text. A reader of another language may see another
value in the same file then, and a small file may fill the memory. Here each of these is an error.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

from rankflow.errors import FileError

MOST_BYTES: Final = 32 * 2**20
MOST_VALUES: Final = 1_000_000  # about 150 MB of Python objects
DEEPEST: Final = 32

# An unfinished string reaches to the end, so that no text is scanned twice.
_STRING: Final = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\Z|\\)', re.DOTALL)
_SURROGATE: Final = re.compile(rb"\\u[dD][89a-fA-F]")
_BRACKET: Final = re.compile(rb"[\[\]{}]")


def read_json(path: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        FileError: It is missing, too large, or not strict JSON.
    """
    try:
        return parse_json(read_bytes(path, MOST_BYTES))
    except ValueError as error:
        raise FileError(f"{path} is not valid JSON: {error}; save or copy it again") from error


def read_bytes(path: Path, most: int) -> bytes:
    """Return the contents of a regular file of at most ``most`` bytes.

    Raises:
        FileError: It is missing, larger, or no regular file, such as a pipe that never ends.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is not a regular file; put a file there")
        with path.open("rb") as file:
            text = file.read(most + 1)
    except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be read: {reason}; save or copy it again") from error
    if len(text) > most:
        raise FileError(
            f"{path} has {path.stat().st_size:,} bytes, and such a file has at most {most:,}; it "
            "was not made by PEFT or RankFlow: save or copy it again"
        )
    return text


def parse_json(text: bytes, *, allow_nan: bool = False, most_values: int = MOST_VALUES) -> Any:
    """Return what strict JSON in UTF-8 says.

    Args:
        text: The JSON.
        allow_nan: Whether ``NaN`` and ``Infinity`` are numbers.
        most_values: Largest number of values in it.

    Raises:
        ValueError: It is not UTF-8, not JSON, too deep or too large, repeats a key, or has a number
            that is not finite.

    >>> parse_json(b'{"r": 4, "r": 8}')
    Traceback (most recent call last):
    ValueError: the key 'r' is there twice
    """
    _check_structure(text, most_values)
    value = json.loads(
        text.decode("utf-8"),
        object_pairs_hook=_unique,
        parse_constant=None if allow_nan else _refuse_constant,
        parse_float=None if allow_nan else _finite,
    )
    if _SURROGATE.search(text):  # half a character, which no UTF-8 can say
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def _check_structure(text: bytes, most_values: int) -> None:
    """Bound the depth and the number of values before any object is made."""
    bare = _STRING.sub(b"", text)
    values = sum(map(bare.count, (b",", b"[", b"{")))
    if values > most_values:
        raise ValueError(f"it holds {values:,} values, and at most {most_values:,} are read")
    brackets = (match[0] for match in _BRACKET.finditer(bare))
    for depth in accumulate(1 if bracket in b"[{" else -1 for bracket in brackets):
        if depth > DEEPEST:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if depth < 0:
            raise ValueError("it closes a bracket that it has not opened")


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (repeated, _), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {repeated[:80]!r} is there twice")
    return values


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is too large for a number")
    return value
