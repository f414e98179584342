"""Run an ablation: what is ready goes to the workers, what comes back decides what is ready."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rankflow.ablation.executors import Executor
from rankflow.ablation.methods.registry import check_methods, find_method
from rankflow.ablation.methods.steered import Steered
from rankflow.ablation.provenance import digest_cell, trace
from rankflow.ablation.records import Cell, CellResult, Place
from rankflow.ablation.schedule import (
    Trial,
    chosen_point,
    is_over,
    obstacle,
    places_of,
    ready_cells,
    source_cell,
    tuning_losses,
)
from rankflow.ablation.store import Store
from rankflow.ablation.tuning import Point
from rankflow.ablation.worker import Order
from rankflow.errors import SpecError
from rankflow.specs.ablation import AblationSpec

_EXPECTED_POINTS: Final = 4  # that tuning measures for a method, most often


@dataclass
class Ablation:
    """The state of an ablation: what has run, and what follows from it.

    Attributes:
        spec: The ablation.
        store: Where results are kept.
        only: Regex for ``task/budget/method``; other places are left alone.
        trials: What the schedule has to know of each method.
        places: The places that are asked for.
    """

    spec: AblationSpec
    store: Store
    only: str = ""
    trials: Mapping[str, Trial] = field(init=False)
    places: list[Place] = field(init=False)
    _ran: dict[Place, dict[Cell, CellResult]] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Check what a spec cannot check by itself.

        Raises:
            SpecError: A method is not there or cannot be varied so, or nothing is asked for.
        """
        check_methods(self.spec)
        self.trials = {name: _trial(self.spec, name) for name in self.spec.methods}
        self.places = _choose_places(places_of(self.spec), self.only)

    @property
    def results(self) -> dict[Cell, CellResult]:
        """What has run, by cell."""
        return {cell: result for ran in self._ran.values() for cell, result in ran.items()}

    def load(self, *, retry: bool = False) -> None:
        """Read what has run before, and is asked for.

        Args:
            retry: Forget what failed, so that it runs again.
        """
        places = frozenset(places_of(self.spec))
        for digest, result in self.store.load().items():
            is_asked = result.cell.place in places and self._reports(result.cell)
            is_wanted = is_asked and not (retry and result.status == "failed")
            if is_wanted and digest_cell(self.spec, result.cell) == digest:
                self._take(result)

    def ready(self) -> list[Cell]:
        """Return the cells that can run now, in the order of the spec."""
        return [
            cell
            for place in self.places
            for cell in ready_cells(self.spec, self.trials, self._near(place), place)
        ]

    def obstacles(self) -> dict[Place, str]:
        """Return what keeps places from being complete, once nothing is ready."""
        found = {p: obstacle(self.spec, self.trials, self._near(p), p) for p in self.places}
        return {place: reason for place, reason in found.items() if reason}

    def order(self, cell: Cell) -> Order:
        """Return what a worker needs to run a cell."""
        near = self._near(cell.place)
        source = source_cell(self.spec, self.trials, near, cell)
        first = self.spec.seeds_of(self.spec.budget(cell.budget))[0]
        return Order(
            cell,
            learned=None if source is None else near[source].ranks,
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
        self._take(outcome)
        return outcome

    def reported(self) -> list[CellResult]:
        """Return what a report is made from: all tuning, and the cells at the chosen points."""
        points = {
            place: chosen_point(self.spec, self.trials, ran, place)
            for place, ran in self._ran.items()
        }
        return [
            result
            for place, ran in self._ran.items()
            for cell, result in ran.items()
            if cell.split == "validation"
            or result.status == "unsupported"
            or points[place] == Point(cell.rate, cell.scaling)
        ]

    def expected(self) -> int:
        """Estimate how many cells there will be when all is done."""
        return sum(self._expected_of(place) for place in self.places)

    def ended(self) -> int:
        """Count the cells of the places that have run."""
        return sum(len(self._ran.get(place, {})) for place in self.places)

    def _reports(self, cell: Cell) -> bool:
        """Whether the seed of a cell is one of its place's."""
        spec = self.spec
        if cell.split == "validation":
            return spec.tuning.enabled and cell.seed in spec.tuning.seeds
        return cell.seed in spec.seeds_of(spec.budget(cell.budget))

    def _take(self, result: CellResult) -> None:
        self._ran.setdefault(result.cell.place, {})[result.cell] = result

    def _near(self, place: Place) -> dict[Cell, CellResult]:
        """Return the results of a place, and of those whose ranks it retrains."""
        near: dict[Cell, CellResult] = {}
        method: str | None = place.method
        while method is not None:
            near |= self._ran.get(replace(place, method=method), {})
            method = self.trials[method].follows
        return near

    def _expected_of(self, place: Place) -> int:
        ran = self._ran.get(place, {})
        if is_over(ran, place):
            return len(ran)
        tests = len(self.spec.seeds_of(self.spec.budget(place.budget)))
        if not self.spec.tuning.enabled:
            return max(len(ran), tests)
        tuned = len(tuning_losses(self.spec, ran, place))
        if chosen_point(self.spec, self.trials, ran, place) is None:
            tuned = max(tuned, _EXPECTED_POINTS)
        return max(len(ran), tuned * len(self.spec.tuning.seeds) + tests)


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


def _choose_places(places: Sequence[Place], only: str) -> list[Place]:
    try:
        chosen = [place for place in places if re.search(only, place.path)]
    except re.error as error:
        raise SpecError(f"--only '{only}' is no regular expression: {error}") from error
    if not chosen:
        raise SpecError(
            f"--only '{only}' matches no task/budget/method; the first of them is {places[0].path}"
        )
    return chosen


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
    return f"{where}: [red]{result.status}[/red]: {escape(result.reason)}"
