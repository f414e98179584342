"""Which cells of an ablation can run now: a pure function of the spec and of what has run.

Nothing is kept between two calls, so that a runner that was killed goes on where it stopped, and
two runs with the same results reach the same table.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rankflow.ablation.records import Cell, CellResult, Place
from rankflow.ablation.tuning import Grid, Point, best_point, mean_losses, next_points
from rankflow.specs.ablation import HIGHER_IS_BETTER, AblationSpec


@dataclass(frozen=True, slots=True)
class Trial:
    """What the schedule has to know of a method.

    Attributes:
        rate: Learning rate at which tuning starts.
        scalings: Factors on the adapter's scale that are tuned.
        follows: The method whose cell of the same seed must have run before; None for none.
    """

    rate: float
    scalings: tuple[float, ...] = (1.0,)
    follows: str | None = None


Results = Mapping[Cell, CellResult]
Trials = Mapping[str, Trial]


def places_of(spec: AblationSpec) -> list[Place]:
    """Return all places in the order of the spec: the first budget on all tasks comes first."""
    return [
        Place(task.name, budget.label, method)
        for budget in spec.budgets
        for task in spec.tasks
        for method in spec.methods
    ]


def ready_cells(spec: AblationSpec, trials: Trials, results: Results, place: Place) -> list[Cell]:
    """Return the cells of a place that have not run, and need nothing that has not run.

    Args:
        spec: The ablation.
        trials: What to know of each method, by name.
        results: What has run.
        place: The place.
    """
    return [
        cell
        for cell in _missing_cells(spec, trials, results, place)
        if trials[place.method].follows is None
        or source_cell(spec, trials, results, cell) is not None
    ]


def obstacle(spec: AblationSpec, trials: Trials, results: Results, place: Place) -> str:
    """Return why a place is not complete although none of its cells can run; else empty.

    What failed or is unsupported is not told here: its results say so.
    """
    missing = _missing_cells(spec, trials, results, place)
    if missing and not ready_cells(spec, trials, results, place):
        seeds = ", ".join(str(seed) for seed in sorted({cell.seed for cell in missing}))
        return (
            f"it retrains the ranks of '{trials[place.method].follows}', of which no run with "
            f"seed {seeds} has finished"
        )
    is_tuned = chosen_point(spec, trials, results, place) is not None
    if missing or is_tuned or is_over(results, place):
        return ""
    return "it diverged at every learning rate that was tried"


def chosen_point(
    spec: AblationSpec, trials: Trials, results: Results, place: Place
) -> Point | None:
    """Return the tuned learning rate and scaling; None while there is something to measure.

    Also None where every learning rate failed.
    """
    trial = trials[place.method]
    if not spec.tuning.enabled:
        return Point(trial.rate, trial.scalings[0])
    found = tuning_losses(spec, results, place)
    if next_points(found, grid_of(spec, trial)) or not math.isfinite(min(found.values())):
        return None
    return best_point(found)


def tuning_losses(spec: AblationSpec, results: Results, place: Place) -> dict[Point, float]:
    """Return the mean loss of each point of which all tuning seeds have run, lower is better."""
    losses: dict[Point, list[float]] = {}
    sign = -1 if HIGHER_IS_BETTER[spec.judge] else 1
    for cell, result in results.items():
        is_tuning = cell.split == "validation" and cell.seed in spec.tuning.seeds
        if is_tuning and cell.place == place:
            value = result.metrics.get(spec.judge, math.inf)
            losses.setdefault(Point(cell.rate, cell.scaling), []).append(sign * value)
    complete = {p: v for p, v in losses.items() if len(v) == len(spec.tuning.seeds)}
    return mean_losses(complete)


def grid_of(spec: AblationSpec, trial: Trial) -> Grid:
    """Return where the tuning of a method starts, and how far it goes."""
    rates = tuple(spec.tuning.rates) or (trial.rate, 2 * trial.rate)
    scalings = trial.scalings if spec.tuning.scalings else trial.scalings[:1]
    return Grid(rates, scalings, spec.tuning.widest)


def is_over(results: Results, place: Place) -> bool:
    """Whether the method turned out not to run here, or an error keeps it from being tuned."""
    return any(
        cell.place == place and (result.status == "unsupported" or _failed_tuning(cell, result))
        for cell, result in results.items()
    )


def source_cell(spec: AblationSpec, trials: Trials, results: Results, cell: Cell) -> Cell | None:
    """Return the finished cell whose ranks a cell retrains; None while there is none."""
    follows = trials[cell.method].follows
    if follows is None:
        return None
    place = Place(cell.task, cell.budget, follows)
    point = chosen_point(spec, trials, results, place)
    if point is None:
        return None
    source = place.cell(cell.split, cell.seed, point.rate, point.scaling)
    return source if source in results and results[source].status == "done" else None


def _missing_cells(
    spec: AblationSpec, trials: Trials, results: Results, place: Place
) -> list[Cell]:
    """Return the cells that are known to be needed and have not run, whatever they wait for."""
    if is_over(results, place):
        return []
    point = chosen_point(spec, trials, results, place)
    if point is not None:
        seeds = spec.seeds_of(spec.budget(place.budget))
        cells = [place.cell("test", seed, point.rate, point.scaling) for seed in seeds]
    else:
        found = tuning_losses(spec, results, place)
        points = next_points(found, grid_of(spec, trials[place.method]))
        cells = [
            place.cell("validation", s, point.rate, point.scaling)
            for point in points
            for s in spec.tuning.seeds
        ]
    return [cell for cell in cells if cell not in results]


def _failed_tuning(cell: Cell, result: CellResult) -> bool:
    return cell.split == "validation" and result.status == "failed"
