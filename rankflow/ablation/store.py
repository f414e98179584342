"""The results of ablations: one folder per cell, in any file system that fsspec knows.

::

    OUT/cells/clinc150/rank-4/hybrid/test-seed0-lr0.004-1f0c.../result.json
    OUT/results.jsonl      the same results in one file, to keep or to move

A result counts for a cell if the digests agree, whatever spec or machine it came from: two specs
that share cells share their results, and a change of the task or the method runs them anew.
"""

import json
import math
import re
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import fsspec
from pydantic import TypeAdapter, ValidationError

from rankflow.ablation.records import Cell, CellResult
from rankflow.durable import claim, write_file
from rankflow.errors import RankFlowError
from rankflow.strict_json import parse_json

RESULT_FILE: Final = "result.json"
ARCHIVE: Final = "results.jsonl"

_RESULT: Final = TypeAdapter(CellResult)


@dataclass(frozen=True, slots=True)
class Store:
    """A folder of results.

    Attributes:
        address: Path or URL, such as ``ablations`` or ``s3://bucket/ablations``.
    """

    address: str

    def load(self) -> dict[str, CellResult]:
        """Return all results by digest; those of folders win over the archive's.

        Raises:
            RankFlowError: A file is no result.
        """
        system, root = self._open()
        results = {}
        archive = f"{root}/{ARCHIVE}"
        if system.exists(archive):
            with system.open(archive, "rt", encoding="utf-8") as file:
                for number, line in enumerate(file, start=1):
                    result = _parse(line, f"{archive}, line {number}")
                    results[result.provenance.digest] = result
        for path in sorted(system.find(f"{root}/cells")):
            if not path.endswith(f"/{RESULT_FILE}"):
                continue  # a cell's folder may hold checkpoints too
            with system.open(path, "rt", encoding="utf-8") as file:
                result = _parse(file.read(), path)
            results[result.provenance.digest] = result
        return results

    def save(self, result: CellResult) -> None:
        """Write a cell's result; it is either whole or not there."""
        folder = cell_path(result.cell, result.provenance.digest)
        self._write(f"{folder}/{RESULT_FILE}", render(result) + "\n")

    def archive(self, results: Iterable[CellResult]) -> None:
        """Write results into one file, in an order that does not depend on when they came."""
        ordered = sorted(results, key=lambda result: (result.cell, result.provenance.digest))
        self._write(ARCHIVE, "".join(f"{render(result)}\n" for result in ordered))

    def claim(self) -> AbstractContextManager[None]:
        """Keep other ablations out while a block runs, where the store is a local folder.

        Raises:
            RankFlowError: On entering, if another one is writing there.
        """
        system, root = self._open()
        return claim(Path(root)) if _is_local(system) else nullcontext()

    def local_folder(self, cell: Cell, digest: str) -> Path | None:
        """Return where a cell may keep checkpoints; None where the store is not a local folder."""
        system, root = self._open()
        if not _is_local(system):
            return None
        return Path(root) / cell_path(cell, digest)

    def _write(self, name: str, text: str) -> None:
        system, root = self._open()
        path = f"{root}/{name}"
        if _is_local(system):
            write_file(Path(path), text)
            return
        folder, _, file = path.rpartition("/")
        system.makedirs(folder, exist_ok=True)
        temporary = f"{folder}/.{file}.part"
        with system.open(temporary, "wt", encoding="utf-8") as stream:
            stream.write(text)
        system.mv(temporary, path)

    def _open(self) -> tuple[Any, str]:
        try:
            system, root = fsspec.url_to_fs(self.address)
        except (ImportError, ValueError) as error:
            raise RankFlowError(
                f"results cannot be kept at '{self.address}': {error}; name a folder, or install "
                "the file system's package"
            ) from error
        return system, root.rstrip("/")


def _is_local(system: Any) -> bool:
    return "file" in (system.protocol if isinstance(system.protocol, tuple) else ())


def cell_path(cell: Cell, digest: str) -> str:
    """Return the folder of a cell below the store's.

    >>> cell_path(Cell("clinc150", "rank 4", "lora", "test", 0, 0.004), "1f0c7a5be2d4")
    'cells/clinc150/rank-4/lora/test-seed0-lr0.004-1f0c7a5be2d4'
    """
    budget = re.sub(r"[^\w.]+", "-", cell.budget)
    scaling = "" if cell.scaling == 1 else f"-x{cell.scaling:g}"
    leaf = f"{cell.split}-seed{cell.seed}-lr{cell.rate:g}{scaling}-{digest}"
    return f"cells/{cell.task}/{budget}/{cell.method}/{leaf}"


def render(result: CellResult) -> str:
    """Return a result as one line of JSON."""
    return json.dumps(_name_infinities(asdict(result)), allow_nan=False)


def _parse(text: str, origin: str) -> CellResult:
    try:
        return _RESULT.validate_python(parse_json(text.encode()))
    except (ValidationError, ValueError) as error:
        raise RankFlowError(
            f"{origin} is not a result of an ablation: {error}; remove it, and the cell runs again"
        ) from error


def _name_infinities(value: Any) -> Any:
    """Write what JSON has no number for as a string, which reading turns back."""
    if isinstance(value, dict):
        return {key: _name_infinities(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_name_infinities(inner) for inner in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
