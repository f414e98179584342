"""What did not go as the spec asks: cells that are missing, broke, or missed their budget."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Final

from rankflow.ablation.records import CellResult
from rankflow.ablation.report.rows import Gathered, MethodRow

_LONGEST_REASON: Final = 300


@dataclass(frozen=True, slots=True)
class Progress:
    """How many of the cells that the spec asks for there are.

    Attributes:
        asked: Cells on the test split.
        done: Those that finished; diverged ones have.
        failed: Those that ended in an error.
        unsupported: Those that will never run, because the method cannot run there.
        missing: Those that have not run, by method, where there are any.
    """

    asked: int
    done: int
    failed: int
    unsupported: int
    missing: dict[str, int]

    @property
    def is_whole(self) -> bool:
        """Whether no cell is missing."""
        return not self.missing


@dataclass(frozen=True, slots=True)
class Trouble:
    """One reason for which cells of a method have no number.

    Attributes:
        method: The method.
        cells: Number of its cells.
        where: Tasks and budgets in words.
        reason: Of the failure, or why it is unsupported; empty for one that diverged.
    """

    method: str
    cells: int
    where: str
    reason: str


def progress(gathered: Gathered) -> Progress:
    """Count the cells."""
    spec = gathered.spec
    done = failed = unsupported = 0
    missing: dict[str, int] = {}
    for place, results in gathered.tests.items():
        seeds = len(spec.seeds_of(spec.budget(place.budget)))
        finished = sum(result.status == "done" for result in results)
        broken = sum(result.status == "failed" for result in results)
        done, failed = done + finished, failed + broken
        rest = seeds - finished - broken
        if gathered.is_unsupported(place):
            unsupported += rest
        elif rest:
            missing[place.method] = missing.get(place.method, 0) + rest
    asked = sum(len(spec.seeds_of(spec.budget(place.budget))) for place in gathered.tests)
    return Progress(asked, done, failed, unsupported, missing)


def failures(gathered: Gathered) -> list[Trouble]:
    """Return the cells that ended in an error, those of tuning included."""
    return _group(gathered, "failed", gathered.all)


def unsupported(gathered: Gathered) -> list[Trouble]:
    """Return the methods that cannot run, with the reason."""
    return _group(gathered, "unsupported", gathered.all)


def diverged(gathered: Gathered) -> list[Trouble]:
    """Return the cells on the test split whose judged metric is not finite."""
    name = gathered.spec.judge
    broken = [
        result
        for results in gathered.tests.values()
        for result in results
        if result.status == "done" and not math.isfinite(result.metrics.get(name, 0.0))
    ]
    return _group(gathered, "done", broken)


def off_budget(rows: Iterable[MethodRow]) -> list[MethodRow]:
    """Return the rows that ended above their budget, or more than 5% below it."""
    return [row for row in rows if row.exceeds or row.misses]


def above_on_the_way(rows: Iterable[MethodRow]) -> dict[str, float]:
    """Return the largest peak by method, as a share of its budget, where it is above 1."""
    peaks: dict[str, float] = {}
    for row in rows:
        for parameters in row.parameters:
            if parameters.peak > parameters.budget > 0:
                share = parameters.peak / parameters.budget
                peaks[row.place.method] = max(peaks.get(row.place.method, 0.0), share)
    return peaks


def _group(gathered: Gathered, status: str, results: Iterable[CellResult]) -> list[Trouble]:
    groups: dict[tuple[str, str], list[CellResult]] = {}
    for result in results:
        if result.status == status:
            groups.setdefault((result.cell.method, result.reason), []).append(result)
    order = {method: index for index, method in enumerate(gathered.spec.methods)}
    return [
        Trouble(method, len(group), _where(group), shorten(reason, _LONGEST_REASON).rstrip("."))
        for (method, reason), group in sorted(groups.items(), key=lambda g: order[g[0][0]])
    ]


def _where(results: Sequence[CellResult]) -> str:
    places: dict[str, list[CellResult]] = {}
    for result in results:
        of = "" if result.cell.split == "test" else f", tuning at {result.cell.rate:g}"
        place = f"{result.cell.task}, {result.cell.budget}{of}"
        places.setdefault(place, []).append(result)
    return "; ".join(f"{place}, {_seeds(group)}" for place, group in places.items())


def _seeds(results: Sequence[CellResult]) -> str:
    seeds = [result.cell.seed for result in results]
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
