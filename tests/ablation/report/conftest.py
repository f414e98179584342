"""An ablation that was never run: a spec, and results drawn from known effects."""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from rankflow.ablation.records import (
    Cell,
    CellResult,
    Forgetting,
    Latency,
    Parameters,
    Provenance,
    RankHistory,
    RankMoment,
    Split,
    Status,
)
from rankflow.specs.ablation import (
    AblationSpec,
    BudgetPoint,
    MethodSpec,
    TaskSpec,
    TuningSpec,
)

SITES = tuple(f"layers.{layer}.{part}" for layer in range(4) for part in ("query", "value", "up"))
RATES = (5e-4, 1e-3, 2e-3)
PROVENANCE = Provenance(
    digest="0123456789ab",
    versions={"torch": "2.9.1", "peft": "0.21.0"},
    commit="f731fd3a9c0e",
    machine="Some CPU",
    finished="2026-01-01T00:00:00Z",
)

# Shift of the logarithm of the metric against plain LoRA.
EFFECTS = {"lora": 0.0, "dora": -0.01, "dynamic": -0.02, "hybrid": -0.08, "prompt": 0.25}
DYNAMIC = ("dynamic", "hybrid")


@dataclass
class Scenario:
    """What to draw.

    Attributes:
        methods: Effect of each method, by name.
        tasks: Level of the metric of each task, by name.
        ranks: Budgets.
        seeds: Number of seeds.
        judge: The metric.
        compare: Declared comparisons.
        interaction: The four methods of an interaction.
        noise: Standard deviation of what is left between paired runs.
        enabled: Whether rates are tuned.
        planted: Whether results carry the recovery of planted ranks.
    """

    methods: dict[str, float] = field(default_factory=lambda: dict(EFFECTS))
    tasks: dict[str, float] = field(default_factory=lambda: {"clinc": 0.5, "wordnet": 1.3})
    ranks: tuple[float, ...] = (1, 2, 4)
    seeds: int = 5
    judge: str = "nll"
    compare: tuple[tuple[str, str], ...] = (("hybrid", "lora"), ("hybrid", "dora"))
    interaction: tuple[str, ...] | None = ("lora", "dora", "dynamic", "hybrid")
    noise: float = 0.005
    enabled: bool = True
    planted: bool = False

    @property
    def spec(self) -> AblationSpec:
        return AblationSpec(
            name="toy",
            description="Does the hybrid pay?",
            methods=tuple(self.methods),
            budgets=tuple(BudgetPoint(rank=rank) for rank in self.ranks),
            tasks=tuple(
                TaskSpec(
                    name=name,
                    model=None,
                    data=None,
                    teacher=None,
                    train={},
                    forgetting=None,
                    written="{}",
                )
                for name in self.tasks
            ),
            seeds=tuple(range(self.seeds)),
            judge=self.judge,
            compare=self.compare,
            interaction=self.interaction,
            margin=0.01,
            alpha=0.05,
            adapter={},
            head_rate=3e-3,
            tuning=TuningSpec(enabled=self.enabled),
            variants={"dynamic": MethodSpec(like="hybrid", use_dora=False)}
            if "dynamic" in self.methods
            else {},
            digest="abcdefabcdef",
        )

    def results(self) -> list[CellResult]:
        spec, results = self.spec, []
        for task in self.tasks:
            for budget in spec.budgets:
                for method in self.methods:
                    if self.enabled:
                        results += [
                            self.result(task, budget.label, method, "validation", 100, rate)
                            for rate in RATES
                        ]
                    results += [
                        self.result(task, budget.label, method, "test", seed, 1e-3)
                        for seed in spec.seeds
                    ]
        return results

    def result(
        self, task: str, budget: str, method: str, split: Split, seed: int, rate: float
    ) -> CellResult:
        rng = random.Random(f"{task} {budget} {method} {split} {seed}")
        shared = random.Random(f"{task} {budget} {split} {seed}")
        rank = float(budget.split()[1])
        log = self.methods[method] + rng.gauss(0, self.noise) + shared.gauss(0, 0.03)
        log += 0.1 * abs(math.log2(rate / 1e-3)) - 0.05 * math.log2(rank)
        nll = self.tasks[task] * math.exp(log)
        allowed = round(10_000 * rank)
        metrics = {
            "nll": nll,
            "accuracy": math.exp(-nll / 3),
            "perplexity": math.exp(nll),
            "excess": nll / 10,
        }
        kept = ("nll", "accuracy", self.judge)
        if self.planted and method in DYNAMIC:
            metrics["rank_spearman"] = 0.9 + 0.02 * rng.random()
            kept += ("rank_spearman",)
        return CellResult(
            cell=Cell(task, budget, method, split, seed, rate),
            status="done",
            provenance=PROVENANCE,
            metrics={name: value for name, value in metrics.items() if name in kept},
            parameters=Parameters(
                budget=allowed,
                final=round(0.99 * allowed),
                peak=round((1.5 if method in DYNAMIC else 0.99) * allowed),
                stored=round(0.99 * allowed),
                head=5_000,
                size=None if method in DYNAMIC else round(rank),
            ),
            seconds_per_step=0.12 + 0.01 * rng.random(),
            cpu_seconds_per_step=0.11 + 0.01 * rng.random(),
            peak_bytes=round(5e7 + 1e6 * rng.random()),
            latency=Latency(
                base=0.010,
                unmerged=0.010 * (1.05 + 0.3 * rng.random()),
                merged=None if method == "prompt" else 0.010,
            ),
            forgetting=Forgetting("similarity", 0.84, 0.84 - 0.05 * rng.random()),
            ranks=self.ranks_of(rng, rank) if method in DYNAMIC else None,
        )

    def ranks_of(self, rng: random.Random, rank: float) -> RankHistory:
        start = tuple(round(1.5 * rank) for _ in SITES)
        final = tuple(
            max(0, round(rank * index / 5 + rng.gauss(0, 0.3))) for index in range(len(SITES))
        )
        return RankHistory(
            sites=SITES,
            moments=(
                RankMoment(0, 100, start, tuple(range(len(SITES)))),
                RankMoment(50, 90, final, (0, 1, 2)),
            ),
        )


def alter(
    results: list[CellResult],
    method: str,
    *,
    task: str | None = None,
    budget: str | None = None,
    seeds: tuple[int, ...] = (0,),
    status: Status = "done",
    reason: str = "",
    value: float | None = None,
    final: float | None = None,
) -> list[CellResult]:
    """Replace results on the test split by ones that broke, have a value, or a final share."""

    def change(result: CellResult) -> CellResult:
        cell = result.cell
        hit = cell.method == method and cell.split == "test" and cell.seed in seeds
        if not (hit and task in (None, cell.task) and budget in (None, cell.budget)):
            return result
        if status != "done":
            return CellResult(cell, status, PROVENANCE, reason=reason)
        if value is not None:
            result = replace(result, metrics=dict.fromkeys(result.metrics, value))
        if final is not None and result.parameters is not None:
            count = round(final * result.parameters.budget)
            result = replace(result, parameters=replace(result.parameters, final=count))
        return result

    return [change(result) for result in results]


def messy() -> tuple[AblationSpec, list[CellResult]]:
    """An ablation in which everything that can go wrong has."""
    scenario = Scenario()
    results = scenario.results()
    results = alter(results, "dora", task="clinc", budget="rank 1", seeds=(1,), value=math.nan)
    results = alter(results, "dynamic", budget="rank 2", seeds=(2, 3), value=math.inf)
    results = alter(
        results, "lora", seeds=(4,), budget="rank 4", status="failed", reason="CUDA out of memory"
    )
    results = alter(
        results,
        "prompt",
        task="wordnet",
        seeds=tuple(range(5)),
        status="unsupported",
        reason="No place for virtual tokens in this | model.",
    )
    results = alter(results, "dora", budget="rank 2", seeds=(0,), final=1.02)
    results = alter(results, "prompt", budget="rank 2", seeds=tuple(range(5)), final=0.7)
    results = [
        result
        for result in results
        if not (result.cell.method == "hybrid" and result.cell.budget == "rank 4")
        or result.cell.seed in (0, 100)
    ]
    return scenario.spec, results


@pytest.fixture
def draw() -> Callable[..., Scenario]:
    """Draws an ablation; its keywords are the scenario's."""
    return Scenario


@pytest.fixture
def change() -> Callable[..., list[CellResult]]:
    """Replaces results by ones that broke."""
    return alter


@pytest.fixture
def broken() -> tuple[AblationSpec, list[CellResult]]:
    """An ablation in which everything that can go wrong has."""
    return messy()
