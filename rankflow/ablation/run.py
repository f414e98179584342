"""Run an ablation: what is ready goes to the workers, what comes back decides what is ready."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rankflow.ablation.executors import Executor
from rankflow.ablation.methods.registry import find_method
from rankflow.ablation.methods.steered import Steered
from rankflow.ablation.provenance import digest_cell, trace
from rankflow.ablation.records import Cell, CellResult
from rankflow.ablation.schedule import (
    Group,
    Trial,
    chosen_point,
    groups_of,
    is_over,
    ready_cells,
    source_cell,
    tuning_losses,
)
from rankflow.ablation.store import Store
from rankflow.ablation.tuning import Point
from rankflow.ablation.worker import Order
from rankflow.specs.ablation import AblationSpec

_EXPECTED_POINTS: Final = 4  # that tuning measures for a method, most often


@dataclass
class Ablation:
    """The state of an ablation: what has run, and what follows from it.

    Attributes:
        spec: The ablation.
        store: Where results are kept.
        only: Regex for ``task/budget/method``; other groups are left alone.
        results: What has run, by cell.
    """

    spec: AblationSpec
    store: Store
    only: str = ""
    results: dict[Cell, CellResult] = field(default_factory=dict)

    def load(self, *, retry: bool = False) -> None:
        """Read what has run before.

        Args:
            retry: Forget what failed, so that it runs again.
        """
        kept = self.store.load()
        names = {task.name for task in self.spec.tasks}, {b.label for b in self.spec.budgets}
        for digest, result in kept.items():
            cell = result.cell
            is_named = cell.task in names[0] and cell.budget in names[1]
            if not is_named or cell.method not in self.spec.methods:
                continue
            if retry and result.status == "failed":
                continue
            if digest_cell(self.spec, cell) == digest:
                self.results[cell] = result

    @property
    def trials(self) -> Mapping[str, Trial]:
        """What the schedule has to know of each method."""
        return {name: _trial(self.spec, name) for name in self.spec.methods}

    @property
    def groups(self) -> list[Group]:
        """The groups that are asked for."""
        return [g for g in groups_of(self.spec) if re.search(self.only, g.path)]

    def ready(self) -> list[Cell]:
        """Return the cells that can run now, in the order of the spec."""
        trials = self.trials
        return [
            cell
            for group in self.groups
            for cell in ready_cells(self.spec, trials, self.results, group)
        ]

    def order(self, cell: Cell) -> Order:
        """Return what a worker needs to run a cell."""
        source = source_cell(self.spec, self.trials, self.results, cell)
        first = self.spec.seeds_of(self.spec.budget(cell.budget))[0]
        return Order(
            cell,
            learned=None if source is None else self.results[source].ranks,
            is_measured=cell.split == "test" and cell.seed == first,
            folder=self.store.local_folder(cell, digest_cell(self.spec, cell)),
        )

    def keep(self, order: Order, outcome: CellResult | BaseException) -> CellResult:
        """Take down what came of an order."""
        cell = order.cell
        if isinstance(outcome, BaseException):
            reason = f"{type(outcome).__name__}: {outcome}"
            digest = digest_cell(self.spec, cell)
            outcome = CellResult(cell, "failed", trace(digest), reason=reason)
        self.store.save(outcome)
        self.results[cell] = outcome
        return outcome

    def reported(self) -> list[CellResult]:
        """Return what a report is made from: all tuning, and the cells at the chosen points."""
        trials = self.trials
        points = {
            group: chosen_point(self.spec, trials, self.results, group)
            for group in groups_of(self.spec)
        }
        return [
            result
            for cell, result in self.results.items()
            if cell.split == "validation"
            or result.status == "unsupported"
            or points[Group(cell.task, cell.budget, cell.method)] == Point(cell.rate, cell.scaling)
        ]

    def expected(self) -> int:
        """Estimate how many cells there will be when all is done."""
        return sum(self._expected_of(group) for group in self.groups)

    def ended(self) -> int:
        """Count the cells of the groups that have run."""
        groups = {(g.task, g.budget, g.method) for g in self.groups}
        return sum((c.task, c.budget, c.method) in groups for c in self.results)

    def _expected_of(self, group: Group) -> int:
        trials = self.trials
        ran = sum(
            (c.task, c.budget, c.method) == (group.task, group.budget, group.method)
            for c in self.results
        )
        if is_over(self.results, group):
            return ran
        tests = len(self.spec.seeds_of(self.spec.budget(group.budget)))
        if not self.spec.tuning.enabled:
            return max(ran, tests)
        tuned = len(tuning_losses(self.spec, self.results, group))
        if chosen_point(self.spec, trials, self.results, group) is None:
            tuned = max(tuned, _EXPECTED_POINTS)
        return max(ran, tuned * len(self.spec.tuning.seeds) + tests)


def run_ablation(ablation: Ablation, executor: Executor, console: Console) -> None:
    """Run all cells that have not run.

    Args:
        ablation: The ablation, loaded.
        executor: Where cells run; it is closed at the end, also after Ctrl-C.
        console: Where to draw.
    """
    columns = (
        TextColumn("cells"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    running: set[Cell] = set()
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("cells", total=None)
            while True:
                waiting = [cell for cell in ablation.ready() if cell not in running]
                for cell in waiting[: executor.free]:
                    running.add(cell)
                    executor.start(ablation.order(cell))
                progress.update(bar, total=ablation.expected(), completed=ablation.ended())
                if not running:
                    break
                for order, outcome in executor.collect():
                    running.discard(order.cell)
                    progress.console.print(
                        _tell(ablation.keep(order, outcome), ablation.spec.judge),
                        highlight=False,
                        soft_wrap=True,
                    )
    finally:
        executor.close()


def _trial(spec: AblationSpec, name: str) -> Trial:
    method = find_method(spec.variant(name))
    follows = method.follows if isinstance(method, Steered) else None
    return Trial(method.rate, method.scalings, follows)


def _tell(result: CellResult, judge: str) -> str:
    cell = result.cell
    scaling = f", scaling {cell.scaling:g}" if cell.scaling != 1 else ""
    where = f"{cell.task}, {cell.budget}, {cell.method}, seed {cell.seed}, lr {cell.rate:g}"
    where += f"{scaling} ({cell.split})"
    if result.status == "done":
        return f"{where}: {judge} {result.metrics.get(judge, float('nan')):.4f}"
    return f"{where}: [red]{result.status}[/red]: {result.reason}"
