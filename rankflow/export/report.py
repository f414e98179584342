"""What an export tells of itself: who can load it, and how far it is from the live model."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rankflow.tensor_files import read_header

REPORT: Final = "export_report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportReport:
    """The record in ``export_report.json``.

    Attributes:
        format: What was written.
        rankflow: The version that wrote it.
        loads_in: Programs that compute the same from it.
        fails_in: Programs that refuse it or read it wrongly, with the reason.
        checked_by: The loader that read it back.
        parameters: Parameters in its files.
        bytes: Size of the files that hold them.
        largest_rank: Largest rank of a site; None where there are no sites any more.
        probe: The inputs on which outputs were compared; None if they were not.
        not_probed: Why they were not.
        absolute_error: Largest error of an output against the live model.
        relative_error: The same as a share of the largest output.
        tolerance: Relative error that would have been refused; None where outputs are told only.
        adapter_effect: Largest change of an output that the adapter makes, for comparison.
        change_error: Relative error of the change of the weights, in the Frobenius norm over all
            sites; None where the change is exact.
        max_lora_rank: The smallest ``--max-lora-rank`` that vLLM needs; None where it loads none.
        tokenizer: Whether a tokenizer is included.
    """

    format: str
    rankflow: str
    loads_in: tuple[str, ...]
    fails_in: tuple[str, ...]
    checked_by: str
    parameters: int
    bytes: int
    largest_rank: int | None = None
    probe: str | None = None
    not_probed: str | None = None
    absolute_error: float | None = None
    relative_error: float | None = None
    tolerance: float | None = None
    adapter_effect: float | None = None
    change_error: float | None = None
    max_lora_rank: int | None = None
    tokenizer: bool = False


def write_report(folder: Path, report: ExportReport) -> None:
    """Write ``export_report.json`` into a folder."""
    text = json.dumps(asdict(report), indent=2) + "\n"
    (folder / REPORT).write_text(text, encoding="utf-8")


def read_report(folder: Path) -> ExportReport:
    """Read what ``write_report`` wrote."""
    values: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    lists = {key: tuple(values[key]) for key in ("loads_in", "fails_in")}
    return ExportReport(**values | lists)


def measure_files(folder: Path) -> tuple[int, int]:
    """Return the parameters and the bytes of a folder's safetensors files."""
    files = sorted(folder.glob("*.safetensors"))
    return sum(map(_count, files)), sum(file.stat().st_size for file in files)


def tell(report: ExportReport) -> Iterator[str]:
    """Say in a few lines what the report holds."""
    yield f"{report.parameters:,} parameters in {report.bytes:,} bytes"
    if report.change_error is not None:
        yield (
            f"the change of the weights is off by {report.change_error:.3%}, "
            f"at ranks up to {report.largest_rank}: this is an approximation"
        )
    if report.probe is None:
        yield f"outputs were not compared: {report.not_probed}"
    else:
        yield (
            f"loaded by {report.checked_by}; outputs differ by at most {report.absolute_error:.2g} "
            f"({report.relative_error:.2g} of the largest), and the adapter changes them by "
            f"{report.adapter_effect:.2g}"
        )
    if report.max_lora_rank is not None:
        yield f"vLLM needs --max-lora-rank {report.max_lora_rank}"
    yield f"loads in {', '.join(report.loads_in)}"
    for reason in report.fails_in:
        yield f"not for {reason}"


def _count(file: Path) -> int:
    return sum(math.prod(tensor.shape) for tensor in read_header(file).tensors.values())
