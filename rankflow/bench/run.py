"""Measure the cases and show a table.

The contestants of a case take turns, step by step, so that a busy machine slows all of them alike.
A ratio is the median of the ratios of steps of the same turn. Steps of a model follow two that
nobody counts.
"""

import ctypes
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from rankflow.bench.cases import Case
from rankflow.bench.contestant import Contestant, Method, time_inference
from rankflow.bench.models import build
from rankflow.errors import RankFlowError, brief

WARM_UP = 2
_MEBI = 2**20


@dataclass(frozen=True)
class Measurement:
    """What a case cost.

    Args:
        case: What was measured.
        step: Seconds of a training step, a median, by method.
        step_ratio: Our step's time over a method's.
        peak: Bytes that the tensors of a training step hold at most, by method.
        inference_ratio: Our forward's time without gradients over LoRA's.
        merged_ratio: Our merged model's time without gradients over the base model's, or None for
            a quantised model, which merging would quantise again.
    """

    case: Case
    step: Mapping[Method, float]
    step_ratio: Mapping[Method, float]
    peak: Mapping[Method, int]
    inference_ratio: float
    merged_ratio: float | None


def run_bench(
    cases: Iterable[Case], *, console: Console, device: str = "cpu", rounds: int = 9
) -> list[Measurement]:
    """Measure cases and print a table.

    Args:
        cases: What to measure.
        console: Where to print.
        device: A torch device.
        rounds: Steps of each contestant that count.

    Returns:
        A measurement of each case.

    Raises:
        RankFlowError: The device is not there.
    """
    place = _find_device(device)
    if place.type == "cpu":
        keep_freed_memory()
    measurements = []
    with console.status("") as status:
        for case in cases:
            status.update(f"Measuring {case.name}")
            measurements.append(measure(case, place, rounds))
    console.print(_table(measurements))
    console.print(
        f"Ratios are ours over theirs. torch {torch.__version__}, {_describe(place)}, "
        f"{rounds} rounds after {WARM_UP}.",
        style="dim",
        highlight=False,
    )
    return measurements


def _find_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RankFlowError(
            f"the device {name!r} cannot be used here: {brief(error)}; try cpu, or cuda on a "
            "machine with a GPU and a torch built for it"
        ) from error


def measure(case: Case, device: torch.device, rounds: int) -> Measurement:
    """Let the methods of a case take turns."""
    contestants = {method: Contestant(case, method, device) for method in Method}
    taken = _take_turns([contestant.time_step for contestant in contestants.values()], rounds)
    steps = dict(zip(contestants, taken, strict=True))
    peaks = {method: contestant.peak() for method, contestant in contestants.items()}
    lora, ours = contestants[Method.LORA], contestants[Method.OURS]
    theirs, mine = _take_turns([lora.time_inference, ours.time_inference], rounds)
    return Measurement(
        case=case,
        step={method: statistics.median(seconds) for method, seconds in steps.items()},
        step_ratio={m: _ratio(steps[Method.OURS], steps[m]) for m in (Method.LORA, Method.DORA)},
        peak=peaks,
        inference_ratio=_ratio(mine, theirs),
        merged_ratio=_compare_merged(ours, case, device, rounds),
    )


def _compare_merged(
    ours: Contestant, case: Case, device: torch.device, rounds: int
) -> float | None:
    if case.shape == "nf4":
        return None
    base = build(case, device)
    ours.model.merge_adapter()

    def run_base() -> float:
        return time_inference(base.model, base.loss, case, device)

    theirs, mine = _take_turns([run_base, ours.time_inference], rounds)
    return _ratio(mine, theirs)


def _take_turns(acts: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Return the seconds of every act in every round that counts."""
    turns = [[act() for act in acts] for _ in range(WARM_UP + rounds)]
    return [list(seconds) for seconds in zip(*turns[WARM_UP:], strict=True)]


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def keep_freed_memory() -> None:
    """Tell glibc not to give freed memory back to the system after every step.

    Whether it does depends on what the process allocated before, and decides by up to a third of a
    step who is faster. It stays so for the rest of the process.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            trim_threshold, mmap_threshold = -1, -3
            mallopt(trim_threshold, 2**31 - 1)
            mallopt(mmap_threshold, 2**25)


def _table(measurements: Sequence[Measurement]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for heading in (
        "LoRA\nms",
        "DoRA\nms",
        "ours\nms",
        "step of\nLoRA",
        "step of\nDoRA",
        "ours\nMiB",
        "peak of\nLoRA",
        "peak of\nDoRA",
        "infer of\nLoRA",
        "merged\nof base",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for m in measurements:
        mine = m.peak[Method.OURS]
        table.add_row(
            m.case.name,
            *(f"{m.step[method] * 1e3:.0f}" for method in Method),
            f"{m.step_ratio[Method.LORA]:.2f}x",
            f"{m.step_ratio[Method.DORA]:.2f}x",
            f"{mine / _MEBI:.0f}",
            f"{mine / m.peak[Method.LORA]:.2f}x",
            f"{mine / m.peak[Method.DORA]:.2f}x",
            f"{m.inference_ratio:.2f}x",
            "-" if m.merged_ratio is None else f"{m.merged_ratio:.2f}x",
        )
    return table


def _describe(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{device}, {threads} thread{'s' * (threads > 1)}"
