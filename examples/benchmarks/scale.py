"""How the cost of RankFlow grows with layers, rank, tokens and sites, and what a model says of it.

    python examples/benchmarks/scale.py

Small decoder layers in float32 on one CPU core. What RankFlow's DoRA adds to a training step
without adapter is measured at points that differ from one base in one dimension. A model counts
what the code does (`rankflow.bench.ledger`) and has three constants of the machine, found at the
points marked with *; all others it has to predict. Scores and events are timed by themselves:
so much a site, and so much a parameter. The allocation is predicted from the smallest model: what
sorts grows with C log C in the number C of components, and all else with C.
"""

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import nnls
from transformers.utils import logging

from rankflow import load_budget
from rankflow.bench.ledger import Operation, ledger_of
from rankflow.bench.machine import Machine, calibrate
from rankflow.bench.run import keep_freed_memory
from rankflow.bench.shapes import SMALL
from rankflow.bench.trainee import EVERY, Adapter, Workload, start
from rankflow.budgeting import resolve_budget
from rankflow.records import ComponentTable, SiteInfo

CPU = torch.device("cpu")
ROUNDS = 15
LAYERS = (4, 8, 16, 32)
SITES = (10**3, 10**4, 10**5)
SORTS = 16  # of all components, in one decision
TARGETS = {
    7: "all-linear",
    4: ("q_proj", "k_proj", "v_proj", "o_proj"),
    3: ("gate_proj", "up_proj", "down_proj"),
}
LLAMA = (
    (4096, 4096),
    (4096, 1024),
    (4096, 1024),
    (4096, 4096),
    *[(4096, 14336)] * 2,
    (14336, 4096),
)


@dataclass(frozen=True, slots=True)
class Point:
    """A size; ``sites`` are those of a layer."""

    layers: int = 4
    rank: int = 32
    tokens: int = 256
    sites: int = 7

    @property
    def workload(self) -> Workload:
        """What is trained."""
        return Workload(SMALL, self.layers, self.tokens, torch.float32, False, TARGETS[self.sites])


BASE = Point()
CALIBRATION = (BASE, Point(rank=8), Point(rank=128), Point(tokens=64), Point(tokens=1024))
POINTS = (
    *(replace(BASE, layers=n) for n in LAYERS),
    *(replace(BASE, rank=r) for r in (8, 128, 384)),
    *(replace(BASE, tokens=t) for t in (64, 512, 1024)),
    *(replace(BASE, sites=s) for s in (3, 4)),
    Point(layers=8, rank=128, tokens=128),
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What RankFlow's DoRA adds to a step: the code's own counts, and seconds."""

    ours: Sequence[Operation]
    floor: Sequence[Operation]
    floor_seconds: float
    seconds: float


def measure_step(point: Point) -> Cost:
    """Let an adapted model and a bare one take turns."""
    bare, ours = (
        start(point.workload, adapter, point.rank, CPU, 10**6)
        for adapter in (Adapter.NONE, Adapter.DORA)
    )
    for _ in range(2):
        bare.step(), ours.step()
    counted = [ledger_of(trainee.train) for trainee in (bare, ours)]
    turns = [(bare.step().total, ours.step().total) for _ in range(ROUNDS)]
    gap = statistics.median(mine - floor for floor, mine in turns)
    return Cost(counted[1], counted[0], statistics.median(floor for floor, _ in turns), gap)


def show_steps(console: Console) -> None:
    """Measure what a step costs at all points, and hold the model against it."""
    costs = {point: measure_step(point) for point in POINTS}
    chosen = [costs[point] for point in CALIBRATION]
    machine = calibrate([(c.ours, c.floor) for c in chosen], [c.seconds for c in chosen])
    table = Table(
        "layers", "rank", "tokens", "sites", "bare ms", "added", "added ms", "predicted", "error",
        box=None, title="what RankFlow's DoRA adds to a training step",
    )  # fmt: skip
    for point, cost in costs.items():
        predicted = machine.seconds(cost.ours) - machine.seconds(cost.floor)
        table.add_row(
            f"{point.layers}{'*' if point in CALIBRATION else ''}",
            str(point.rank),
            str(point.tokens),
            str(point.layers * point.sites),
            f"{cost.floor_seconds * 1e3:.0f}",
            f"{cost.seconds / cost.floor_seconds:.1%}",
            *compare(cost.seconds, predicted),
        )
    console.print(table)
    console.print(describe(machine), style="dim", highlight=False)


def describe(machine: Machine) -> str:
    """Return the constants of a machine in words."""
    return (
        f"{machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s, "
        f"{machine.latency * 1e6:.1f} us an operation"
    )


def measure_engine(layers: int, rank: int) -> tuple[float, float, int]:
    """Return the seconds of `observe` and of an event, and the adapter's parameters."""
    workload = Point(layers=layers, tokens=16).workload
    trainee = start(workload, Adapter.LORA, rank, CPU, 10**6)
    times = [trainee.step() for _ in range(10 * EVERY)][EVERY:]
    assert trainee.flow is not None  # of an adapter that moves ranks
    scores = statistics.median(t.importance for t in times if t.kind == "plain")
    return (
        scores,
        statistics.median(t.event for t in times if t.kind == "event"),
        trainee.flow.spent,
    )


def show_engine(console: Console) -> None:
    """Measure scores and events, and predict the largest models from all others."""
    sizes = [(layers, rank) for rank in (8, 32) for layers in LAYERS]
    found = [measure_engine(*size) for size in sizes]
    is_small = np.array([layers < LAYERS[-1] for layers, _ in sizes])
    counts = np.array([[1, 7 * n, p] for (n, _), (*_, p) in zip(sizes, found, strict=True)])
    table = Table(
        "sites", "rank", "parameters", "observe ms", "predicted", "error", "event ms", "predicted",
        "error", box=None, title="scores and events",
    )  # fmt: skip
    measured = np.array([seconds for *seconds, _ in found])
    # An event does nothing that does not grow; observe also looks at the step as a whole.
    predicted = [
        counts[:, columns] @ fit(counts[is_small][:, columns], measured[is_small, i])
        for i, columns in enumerate(([0, 1, 2], [1, 2]))
    ]
    for k, (layers, rank) in enumerate(sizes):
        cells = [f"{7 * layers}{'*' if is_small[k] else ''}", str(rank), f"{found[k][2]:,}"]
        for i in range(2):
            cells += compare(measured[k, i], predicted[i][k])
        table.add_row(*cells)
    console.print(table)


def fit(counts: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the seconds of each thing counted, none negative, of least relative error."""
    return nnls(counts / seconds[:, None], np.ones(len(seconds)))[0]


def compare(seconds: float, predicted: float) -> list[str]:
    """Return what was measured, what was predicted, and by how much that is wrong."""
    return [
        f"{seconds * 1e3:.3g}",
        f"{predicted * 1e3:.3g}",
        f"{predicted / seconds - 1:+.0%}",
    ]


@dataclass(frozen=True, slots=True)
class Decision:
    """What one decision about a model costs: components, seconds, and those spent on sorting."""

    components: int
    seconds: float
    sorting: float

    def predict(self, components: int) -> float:
        """Return the seconds for another number of components, by C for most and C log C."""
        more = components / self.components
        logs = np.log2(components) / np.log2(self.components)
        return float(more * (self.seconds + self.sorting * (logs - 1)))


def time_allocation(sites: int) -> Decision:
    """Decide about a model of many sites."""
    infos = [
        SiteInfo(f"site{i}", "linear", *LLAMA[i % 7], False, min_rank=0, max_rank=1024)
        for i in range(sites)
    ]
    spec = load_budget("reallocate", rank=8)
    resolved = resolve_budget(
        spec, infos, total_steps=1000, base_parameters=1, bytes_per_parameter=4
    )
    rng = np.random.default_rng(0)
    ranks, components = resolved.start_ranks, int(resolved.start_ranks.sum())
    ages = np.full(components, spec.protect)
    scores, demand = rng.lognormal(0, 1.5, components), rng.lognormal(0, 1.5, sites)
    table = ComponentTable(resolved.sites, ranks, scores, ages, demand)
    deciding = median_seconds(lambda: resolved.scheduler.plan(table, step=300))
    return Decision(components, deciding, SORTS * median_seconds(lambda: np.argsort(scores)))


def median_seconds(act: Callable[[], object], repeats: int = 5) -> float:
    """Return the median seconds of a computation, without its first run."""
    gc.collect()
    gc.freeze()  # or every other decision also pays for a look at all objects of the process
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        act()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def show_allocation(console: Console) -> None:
    """Measure the allocation, and predict the larger ones from the smallest."""
    table = Table("sites", "components", "ms", "predicted", "error", box=None, title="allocation")
    decisions = [time_allocation(sites) for sites in SITES]
    for sites, decision in zip(SITES, decisions, strict=True):
        predicted = decisions[0].predict(decision.components)
        cells = compare(decision.seconds, predicted)
        table.add_row(f"{sites:,}", f"{decision.components:,}", *cells)
    console.print(table)


def main() -> None:
    """Measure all."""
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    keep_freed_memory()
    console = Console(width=110)
    show_allocation(console)
    show_engine(console)
    show_steps(console)


if __name__ == "__main__":
    main()
