"""A training step in the shape of Llama-3-8B: no adapter, PEFT's adapters, and RankFlow's.

    python examples/benchmarks/gpu.py                     # on a GPU, or else in a small form
    python examples/benchmarks/gpu.py --record gpu.json   # and the figures for a script

On a GPU: 8 of the 32 decoder layers, random weights in bf16 and once in nf4, 4096 tokens, adapters
in float32 on all 7 linear layers; embedding and head are left out. The contestants take turns, step
by step, so that whatever slows the machine slows all alike. A run is one in miniature, with an
event at every 8th step and gradients sketched in 2 steps before it, of which the table says

* step: median of the steps without event and sketch; its ratios to no adapter, to PEFT's LoRA and
  to PEFT's DoRA are medians over turns;
* tokens/s: of all 32 layers, as if each took what these take;
* peak: the most that weights, adapter, optimizer and steps hold at a time, events included;
* scores: `observe` (in AdaLoRA `update_and_allocate`), as a share of the step;
* event: the reallocation of all sites, and sketched: a step with its gradients sketched, in steps;
* run: the average step of 1,000 at the preset's own pace, over PEFT LoRA's step.
"""

import json
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from rankflow.bench.shapes import LLAMA3_8B, SMALL, TINY
from rankflow.bench.trainee import EVERY, PRESETS, Adapter, StepTime, Workload, pace, start

WARM_UP = 3  # turns that nobody counts
RUN = 1000  # steps of the run over which events are spread
RANKS = (8, 32, 128, 384)
SMALL_RANKS = (8, 32)


@dataclass(frozen=True, slots=True)
class Row:
    """What one adapter cost; ratios are to steps of the same turns."""

    base: str
    rank: int
    adapter: str
    step_ms: float
    of_none: float
    of_lora: float
    of_dora: float
    tokens_per_second: float
    peak_mib: float
    peak_of_lora: float
    scores_share: float
    event_steps: float | None
    sketched_steps: float | None
    run_of_lora: float


def main(
    device: Annotated[
        str, typer.Option(help="A torch device; by default a GPU if there is one.")
    ] = "",
    rounds: Annotated[int, typer.Option(help="Turns that count.")] = 4 * EVERY,
    rank: Annotated[list[int] | None, typer.Option(help="Ranks, instead of all.")] = None,
    base: Annotated[str, typer.Option(help="bf16, nf4 or both.")] = "both",
    tiny: Annotated[bool, typer.Option(help="A model too small to tell anything.")] = False,
    record: Annotated[Path | None, typer.Option(help="Where to write the figures as JSON.")] = None,
) -> None:
    """Measure, and print a table for every base and rank."""
    logging.set_verbosity_error()
    console = Console(width=150)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    bases = ["bf16", "nf4"] if base == "both" else [base]
    if "nf4" in bases and (place.type == "cpu" or not find_spec("bitsandbytes")):
        bases.remove("nf4")  # on a CPU it would measure bitsandbytes alone
        console.print("nf4 is left out: it needs a GPU and bitsandbytes", style="dim")
    rows: list[Row] = []
    for name in bases:
        for r in rank or (RANKS if place.type == "cuda" else SMALL_RANKS):
            workload = choose(place, tiny=tiny, nf4=name == "nf4")
            found = measure(workload, name, r, place, rounds)
            console.print(draw(found, workload))
            rows += found
    machine = describe(place)
    console.print(
        f"torch {torch.__version__}, {machine}, {rounds} turns after {WARM_UP}", style="dim"
    )
    if record is not None:
        text = json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1)
        record.write_text(text + "\n")


def choose(device: torch.device, *, tiny: bool, nf4: bool) -> Workload:
    """Return what is trained on a device."""
    if tiny:
        return Workload(TINY, 2, 16, torch.bfloat16, nf4)
    if device.type == "cuda":
        return Workload(LLAMA3_8B, 8, 4096, torch.bfloat16, nf4)
    return Workload(SMALL, 2, 128, torch.bfloat16, nf4)


def measure(
    workload: Workload, base: str, rank: int, device: torch.device, rounds: int
) -> list[Row]:
    """Let all adapters of one rank take turns."""
    steps = 2 * (WARM_UP + rounds)
    trainees = {a: start(workload, a, rank, device, steps) for a in Adapter}
    times: dict[Adapter, list[StepTime]] = {a: [] for a in Adapter}
    for _ in range(WARM_UP + rounds):
        for adapter, trainee in trainees.items():
            times[adapter].append(trainee.step())
    del trainees
    peaks = {a: start(workload, a, rank, device, steps).peak() for a in Adapter}
    counted = {a: t[WARM_UP:] for a, t in times.items()}
    whole = workload.shape.layers / workload.layers
    rows = []
    for adapter, mine in counted.items():
        step = median(of_kind("plain", mine), "total")
        event = sketched = None
        average = step
        if adapter in PRESETS:
            event = median(of_kind("event", mine), "event") / step
            sketched = median(of_kind("sketched", mine), "total") / step
            events, sketches = pace(adapter, RUN)
            average *= 1 + events * event + sketches * (sketched - 1)
        rows.append(
            Row(
                base=base,
                rank=rank,
                adapter=adapter.value,
                step_ms=step * 1e3,
                of_none=ratio(mine, counted[Adapter.NONE]),
                of_lora=ratio(mine, counted[Adapter.PEFT_LORA]),
                of_dora=ratio(mine, counted[Adapter.PEFT_DORA]),
                tokens_per_second=workload.tokens / (step * whole),
                peak_mib=peaks[adapter] / 2**20,
                peak_of_lora=peaks[adapter] / peaks[Adapter.PEFT_LORA],
                scores_share=median(of_kind("plain", mine), "importance") / step,
                event_steps=event,
                sketched_steps=sketched,
                run_of_lora=average / step * ratio(mine, counted[Adapter.PEFT_LORA]),
            )
        )
    return rows


def of_kind(kind: str, times: Sequence[StepTime]) -> list[StepTime]:
    """Return the steps of a kind."""
    return [time for time in times if time.kind == kind]


def median(times: Sequence[StepTime], part: str) -> float:
    """Return the median seconds of a part of some steps."""
    return statistics.median(getattr(time, part) for time in times)


def ratio(mine: Sequence[StepTime], theirs: Sequence[StepTime]) -> float:
    """Return the median ratio of steps of the same turns, without event and sketch."""
    pairs = zip(of_kind("plain", mine), of_kind("plain", theirs), strict=True)
    return statistics.median(a.total / b.total for a, b in pairs)


def draw(rows: Sequence[Row], workload: Workload) -> Table:
    """Return the table of one base and rank."""
    first = rows[0]
    table = Table(
        "adapter", "step ms", "of none", "of LoRA", "of DoRA", "tokens/s", "peak MiB", "of LoRA",
        "scores", "event", "sketched", "run of LoRA", box=None,
        title=f"{workload.layers} layers of {workload.shape.name}, {first.base}, r = {first.rank}, "
        f"{workload.tokens} tokens",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(
            row.adapter,
            f"{row.step_ms:.1f}",
            f"{row.of_none:.2f}x",
            f"{row.of_lora:.2f}x",
            f"{row.of_dora:.2f}x",
            f"{row.tokens_per_second:,.0f}",
            f"{row.peak_mib:,.0f}",
            f"{row.peak_of_lora:.2f}x",
            f"{row.scores_share:.2%}",
            "" if row.event_steps is None else f"{row.event_steps:.2f}",
            "" if row.sketched_steps is None else f"{row.sketched_steps:.2f}",
            f"{row.run_of_lora:.2f}x",
        )
    return table


def describe(device: torch.device) -> str:
    """Name the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU, {threads} thread{'s' * (threads > 1)}"


if __name__ == "__main__":
    typer.run(main)
