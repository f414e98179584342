"""safetensors files that anybody may have written, checked before anything maps or copies them.

The format is a length of eight bytes, a header in JSON, and the tensors' bytes. Its own readers
notice a file cut short; they do not notice a key that is there twice, of which each reader may take
another one, nor tensors that are not finite.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np

from rankflow.errors import FileError, excerpt
from rankflow.strict_json import parse_json

MOST_HEADER: Final = 100_000_000  # the format's own limit, in bytes
_MOST_AXES: Final = 64  # numpy's limit; more would only be a long product
_LONGEST_NAME: Final = 4096
_CHUNK: Final = 4 * 2**20
_PICKLES: Final = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")

BITS: Final[Mapping[str, int]] = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "U32": 32,
    "I32": 32,
    "U64": 64,
    "I64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F16": 16,
    "BF16": 16,
    "F32": 32,
    "F64": 64,
    "C64": 64,
}
_REAL: Final = frozenset({"F8_E4M3", "F8_E5M2", "F16", "BF16", "F32", "F64"})
# How a number that is not finite looks: all of these bits are set.
_NOT_FINITE: Final = {
    "F8_E4M3": ("<u1", 0x7F),
    "F8_E5M2": ("<u1", 0x7C),
    "F8_E8M0": ("<u1", 0xFF),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
    "C64": ("<u4", 0x7F800000),
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file.

    Attributes:
        dtype: The format's name of its type, such as ``F32``.
        shape: Its shape.
        start, stop: Its bytes, counted from the start of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def is_float(self) -> bool:
        """Whether it holds real numbers of a type in which adapters are saved."""
        return self.dtype in _REAL


@dataclass(frozen=True, slots=True)
class TensorFile:
    """What the header of a file says, checked.

    Attributes:
        path: The file.
        tensors: Its tensors by name.
        metadata: What else it tells.
    """

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(path: Path) -> TensorFile:
    """Read and check the header of a safetensors file; no tensor is read.

    Every byte behind the header must belong to exactly one tensor, and every tensor must have as
    many bytes as its shape and type say.

    Raises:
        FileError: The file is missing, damaged, or of another format.
    """
    try:
        if path.exists() and not path.is_file():
            raise FileError(f"{path} is not a regular file; put a safetensors file there")
        with path.open("rb") as file:
            size = path.stat().st_size
            length = _header_length(path, file.read(8), size)
            text = file.read(length)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be read: {reason}; save or copy it again") from error
    try:
        header = parse_json(text)
        if not isinstance(header, dict) or not text.startswith(b"{"):
            raise ValueError(f"its header is {excerpt(header)} instead of an object")
        metadata = _check_metadata(header.pop("__metadata__", {}))
        tensors = {name: _check_entry(name, entry, 8 + length) for name, entry in header.items()}
        _check_cover(tensors, 8 + length, size)
    except ValueError as error:
        _refuse(path, str(error))
    return TensorFile(path, tensors, metadata)


def check_finite(file: TensorFile) -> None:
    """Read the tensors of a file once and refuse numbers that are not finite.

    Raises:
        FileError: One of them holds NaN or an infinity.
    """
    buffer = bytearray(_CHUNK)
    with file.path.open("rb") as stream:
        for name, tensor in file.tensors.items():
            if tensor.dtype not in _NOT_FINITE:
                continue
            kind, mask = _NOT_FINITE[tensor.dtype]
            stream.seek(tensor.start)
            left = tensor.stop - tensor.start
            while left > 0:
                read = stream.readinto(memoryview(buffer)[: min(left, _CHUNK)])
                bits = np.frombuffer(buffer, dtype=kind, count=read // np.dtype(kind).itemsize)
                if read == 0 or np.any((bits & mask) == mask):
                    raise FileError(
                        f"{file.path} holds a number that is not finite in {name!r}: the training "
                        "diverged or the file is damaged; use an earlier one, or copy it again"
                    )
                left -= read


def _header_length(path: Path, start: bytes, size: int) -> int:
    if len(start) < 8:
        _refuse(path, f"it has {len(start)} bytes")
    length: int = struct.unpack("<Q", start)[0]
    is_possible = length <= min(MOST_HEADER, size - 8)
    if not is_possible and start.startswith(_PICKLES):  # a length of 640 begins like one
        raise FileError(
            f"{path} is a pickle of PyTorch, which may run code when it is read; RankFlow reads "
            "safetensors only: ask for such a file, or convert it where you trust its author"
        )
    if not is_possible:
        _refuse(
            path,
            f"its header is to have {length:,} bytes, and there are {size - 8:,} in the file; a "
            f"header has at most {MOST_HEADER:,}",
        )
    return length


def _check_metadata(metadata: object) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata is not an object of strings")
    return metadata


def _check_entry(name: str, entry: Any, data: int) -> StoredTensor:
    if not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError(f"{excerpt(name)} is not the name of a tensor")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{excerpt(name)} is {excerpt(entry)}: not dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise ValueError(f"{excerpt(name)} has the unknown type {excerpt(dtype)}")
    if not _are_counts(shape) or len(shape) > _MOST_AXES:
        raise ValueError(f"{excerpt(name)} has the shape {excerpt(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{excerpt(name)} has the offsets {excerpt(offsets)}")
    bits, span = math.prod(shape) * BITS[dtype], offsets[1] - offsets[0]
    if bits != 8 * span:
        raise ValueError(
            f"{excerpt(name)} of type {dtype} and shape {excerpt(shape)} has {span:,} bytes"
        )
    return StoredTensor(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 2**63 for v in values)


def _check_cover(tensors: Mapping[str, StoredTensor], data: int, size: int) -> None:
    """Check that the tensors follow each other from the header to the end of the file."""
    reached = data
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if tensor.start != reached:
            what = "overlaps the one before it" if tensor.start < reached else "leaves a hole"
            raise ValueError(f"{excerpt(name)} {what}, at byte {tensor.start - data:,}")
        reached = tensor.stop
    if reached != size:
        raise ValueError(f"its tensors end at byte {reached:,}, and it has {size:,}")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise FileError(f"{path} is damaged: {reason}; save or copy it again")
