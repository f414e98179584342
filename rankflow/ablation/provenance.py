"""Where a result comes from: versions, commit, machine, and the digest of what decides it."""

import platform
import subprocess
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Final

import torch

from rankflow.ablation.methods.registry import find_method
from rankflow.ablation.methods.steered import Steered
from rankflow.ablation.records import Cell, Provenance
from rankflow.specs.ablation import AblationSpec, digest_of

_PACKAGES: Final = ("rankflow", "torch", "transformers", "peft", "numpy", "scipy")


def digest_cell(spec: AblationSpec, cell: Cell) -> str:
    """Identify everything that decides a cell's result, on any machine.

    That is the cell, the task as it was written, the adapter, the head's learning rate and the
    method, with every key of its budget; not the contents of data files.
    """
    return digest_of(
        {
            "cell": asdict(cell),
            "seed": cell.training_seed,
            "task": spec.task(cell.task).written,
            "adapter": spec.adapter,
            "head_rate": spec.head_rate,
            "method": _identify(spec, cell.method),
        }
    )


def trace(digest: str) -> Provenance:
    """Return where a result that is made now comes from."""
    return Provenance(
        digest=digest,
        versions={name: version(name) for name in _PACKAGES},
        commit=_commit(),
        machine=_machine(),
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _identify(spec: AblationSpec, name: str) -> object:
    variant = spec.variant(name)
    method = find_method(variant)
    if not isinstance(method, Steered):
        return variant.model_dump(exclude={"rate"})
    budget = method.budget(parameters=2, seed=0).model_dump(exclude={"description"})
    source = _identify(spec, method.follows) if method.follows else None
    return {
        "budget": budget,
        "use_dora": method.use_dora,
        "factor": method.factor,
        "rank_stabilised": method.rank_stabilised,
        "quantised": method.quantised,
        "truncates": method.truncates,
        "follows": source,
    }


@cache
def _commit() -> str:
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            cwd=Path.cwd(),
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


@cache
def _machine() -> str:
    processor = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        pass
    return (
        f"{processor}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else processor
    )
