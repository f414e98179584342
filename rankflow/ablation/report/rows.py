"""What the results of an ablation say about each method, as frozen rows.

Only finite numbers are averaged, and every row tells how many of its seeds were not.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rankflow.ablation.records import CellResult, Parameters, Place, Status, reaches
from rankflow.ablation.schedule import places_of
from rankflow.ablation.statistics.spread import Spread, spread
from rankflow.errors import RankFlowError
from rankflow.specs.ablation import HIGHER_IS_BETTER, AblationSpec


@dataclass(frozen=True, slots=True)
class Gathered:
    """The results that a spec asks for, in its order.

    Attributes:
        spec: The ablation.
        tests: Results on the test split, by seed, at each place.
        trials: Results of tuning, by learning rate, scaling and seed, at each place.
        strangers: Results that the spec does not ask for; they are left out.
    """

    spec: AblationSpec
    tests: Mapping[Place, tuple[CellResult, ...]]
    trials: Mapping[Place, tuple[CellResult, ...]]
    strangers: int

    def places(self, task: str, budget: str) -> list[Place]:
        """Return the places of all methods at one budget on one task."""
        return [Place(task, budget, method) for method in self.spec.methods]

    @property
    def all(self) -> list[CellResult]:
        """All results, those of tuning first."""
        groups = [*self.trials.values(), *self.tests.values()]
        return [result for group in groups for result in group]

    def is_unsupported(self, place: Place) -> bool:
        """Whether the method turned out not to run there."""
        return any(r.status == "unsupported" for r in (*self.tests[place], *self.trials[place]))


@dataclass(frozen=True, slots=True)
class MethodRow:
    """What was measured of one method at one budget on one task.

    Attributes:
        place: Where.
        seeds: Seeds that finished; a seed that diverged has finished.
        expected: Number of seeds that the spec asks for.
        status: ``unsupported`` or ``failed`` where nothing finished for that reason.
        quality: The judged metric over seeds.
        others: The other metrics over seeds, by name.
        parameters: What was trained, of each seed that counted it.
        step: Wall time of a step, in seconds (median over seeds).
        cpu_step: The same in CPU time.
        peak_bytes: Peak memory of a step (median over seeds).
        unmerged: Latency as a multiple of the base model's (median over seeds).
        merged: The same with the adaptation folded in.
        unmergeable: Whether it was found that it cannot be folded in.
        forgetting: What is measured before and after; empty for nothing.
        before: Mean of it before.
        after: The same after training.
        rates: Learning rates of the seeds.
        scalings: Scalings of the seeds.
    """

    place: Place
    seeds: tuple[int, ...]
    expected: int
    status: Status
    quality: Spread
    others: Mapping[str, Spread]
    parameters: tuple[Parameters, ...]
    step: float | None
    cpu_step: float | None
    peak_bytes: float | None
    unmerged: float | None
    merged: float | None
    unmergeable: bool
    forgetting: str
    before: float | None
    after: Spread
    rates: tuple[float, ...]
    scalings: tuple[float, ...]

    @property
    def budget(self) -> int:
        """Parameters that the method was allowed; 0 if nothing counted them."""
        return max((p.budget for p in self.parameters), default=0)

    @property
    def exceeds(self) -> bool:
        """Whether some seed ended above its budget."""
        return any(p.final > p.budget for p in self.parameters)

    @property
    def misses(self) -> bool:
        """Whether some seed ended more than 5% below its budget."""
        return any(p.final < p.budget and not reaches(p.final, p.budget) for p in self.parameters)


def gather(spec: AblationSpec, results: Iterable[CellResult]) -> Gathered:
    """Sort the results into the places that the spec asks for.

    Args:
        spec: The ablation.
        results: Results in any order.

    Raises:
        RankFlowError: One seed has two results at one place, so that no one could tell which
            counts.
    """
    places = places_of(spec)
    tests: dict[Place, list[CellResult]] = {place: [] for place in places}
    trials: dict[Place, list[CellResult]] = {place: [] for place in places}
    strangers = 0
    for result in results:
        place = result.cell.place
        groups = tests if result.cell.split == "test" else trials
        if place in groups and result.cell.seed in _seeds_asked(spec, result):
            groups[place].append(result)
        else:
            strangers += 1
    ordered = {place: _in_order(group) for place, group in tests.items()}
    for place, group in ordered.items():
        _check_unique(place, group)
    return Gathered(
        spec=spec,
        tests=ordered,
        trials={place: _in_order(group) for place, group in trials.items()},
        strangers=strangers,
    )


def method_row(gathered: Gathered, place: Place) -> MethodRow:
    """Return what was measured at one place."""
    spec = gathered.spec
    tests = gathered.tests[place]
    done = [result for result in tests if result.status == "done"]
    names = dict.fromkeys(name for result in done for name in result.metrics)
    latencies = [result.latency for result in done if result.latency is not None]
    losses = [result.forgetting for result in done if result.forgetting is not None]
    return MethodRow(
        place=place,
        seeds=tuple(result.cell.seed for result in done),
        expected=len(spec.seeds_of(spec.budget(place.budget))),
        status=_status(gathered, place, done),
        quality=spread(metric_values(done, spec.judge), level=1 - spec.alpha),
        others={
            name: spread(metric_values(done, name), level=1 - spec.alpha)
            for name in names
            if name != spec.judge
        },
        parameters=tuple(r.parameters for r in done if r.parameters is not None),
        step=_median([result.seconds_per_step for result in done]),
        cpu_step=_median([result.cpu_seconds_per_step for result in done]),
        peak_bytes=_median([result.peak_bytes for result in done]),
        unmerged=_median([latency.unmerged / latency.base for latency in latencies]),
        merged=_median([x.merged / x.base for x in latencies if x.merged is not None]),
        unmergeable=bool(latencies) and all(latency.merged is None for latency in latencies),
        forgetting=", ".join(dict.fromkeys(loss.measure for loss in losses)),
        before=_mean([loss.before for loss in losses]),
        after=spread([loss.after for loss in losses], level=1 - spec.alpha),
        rates=tuple(dict.fromkeys(result.cell.rate for result in done)),
        scalings=tuple(dict.fromkeys(result.cell.scaling for result in done)),
    )


def best_row(rows: Sequence[MethodRow], spec: AblationSpec) -> MethodRow | None:
    """Return the row of the best mean among those that are comparable.

    A method that ended above its budget, is a control with more of it, diverged somewhere, or has
    fewer seeds than another, is not comparable.
    """
    sound = [
        row
        for row in rows
        if row.quality.n
        and not row.quality.broken
        and not row.exceeds
        and (spec.variant(row.place.method).factor or 1) <= 1
    ]
    most = max((row.quality.n for row in sound), default=0)
    sign = -1 if HIGHER_IS_BETTER[spec.judge] else 1
    return min(
        (row for row in sound if row.quality.n == most),
        key=lambda row: sign * row.quality.mean,
        default=None,
    )


def metric_values(results: Iterable[CellResult], name: str) -> list[float]:
    """Return a metric of each result that has it."""
    return [result.metrics[name] for result in results if name in result.metrics]


def _seeds_asked(spec: AblationSpec, result: CellResult) -> Sequence[int]:
    if result.cell.split == "validation":
        return spec.tuning.seeds
    return spec.seeds_of(spec.budget(result.cell.budget))


def _check_unique(place: Place, results: Sequence[CellResult]) -> None:
    found: dict[int, CellResult] = {}
    for result in results:
        other = found.setdefault(result.cell.seed, result)
        if other is not result:
            raise RankFlowError(
                f"two results for {place.method} on {place.task} at {place.budget} with seed "
                f"{result.cell.seed}: learning rates {other.cell.rate:g} and "
                f"{result.cell.rate:g}, scalings {other.cell.scaling:g} and "
                f"{result.cell.scaling:g}; report the one that tuning chose"
            )


def _in_order(results: Iterable[CellResult]) -> tuple[CellResult, ...]:
    return tuple(sorted(results, key=lambda r: (r.cell.rate, r.cell.scaling, r.cell.seed)))


def _status(gathered: Gathered, place: Place, done: Sequence[CellResult]) -> Status:
    if done:
        return "done"
    if gathered.is_unsupported(place):
        return "unsupported"
    results = (*gathered.tests[place], *gathered.trials[place])
    return "failed" if any(result.status == "failed" for result in results) else "done"


def _median(values: Iterable[float | None]) -> float | None:
    measured = [value for value in values if value is not None and math.isfinite(value)]
    return median(measured) if measured else None


def _mean(values: Iterable[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None
