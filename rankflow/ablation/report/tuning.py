"""What was tried while tuning, and what was chosen."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from rankflow.ablation.records import CellResult, Place
from rankflow.ablation.report.document import Block, Bullets, Heading, Paragraph, Table
from rankflow.ablation.report.numbers import decimals_of, with_interval
from rankflow.ablation.report.rows import Gathered
from rankflow.specs.ablation import HIGHER_IS_BETTER

CHOSEN: Final = "◂"


@dataclass(frozen=True, slots=True)
class TuningRow:
    """What one method reached on the validation split at one scaling.

    Attributes:
        place: Where.
        scaling: Factor on the adapter's scale.
        values: Mean of the judged metric over tuning seeds by learning rate; NaN where one of
            them diverged or failed.
        chosen: The learning rate that the reported seeds ran at; None if it was not this scaling,
            or none has run.
        best: The learning rate of the best mean of all scalings; None if it is another scaling's.
    """

    place: Place
    scaling: float
    values: Mapping[float, float]
    chosen: float | None
    best: float | None

    @property
    def is_at_edge(self) -> bool:
        """Whether no worse rate was measured on one side of the best."""
        return self.best in (min(self.values), max(self.values))


def tuning_rows(gathered: Gathered, place: Place) -> list[TuningRow]:
    """Return a row for each scaling that was tried at a place."""
    spec = gathered.spec
    points: dict[tuple[float, float], list[CellResult]] = {}
    for result in gathered.trials[place]:
        if result.status != "unsupported":
            points.setdefault((result.cell.scaling, result.cell.rate), []).append(result)
    means = {point: _mean(results, spec.judge) for point, results in points.items()}
    sign = -1 if HIGHER_IS_BETTER[spec.judge] else 1
    finite = {point: sign * mean for point, mean in means.items() if math.isfinite(mean)}
    best = min(sorted(finite, key=lambda p: p[1]), key=finite.__getitem__, default=None)
    ran = {(r.cell.scaling, r.cell.rate) for r in gathered.tests[place]}
    return [
        TuningRow(
            place=place,
            scaling=scaling,
            values={rate: mean for (s, rate), mean in sorted(means.items()) if s == scaling},
            chosen=next((rate for s, rate in sorted(ran) if s == scaling), None),
            best=best[1] if best is not None and best[0] == scaling else None,
        )
        for scaling in sorted({scaling for scaling, _ in points})
    ]


def tuning_blocks(gathered: Gathered) -> list[Block]:
    """Return a table of what was tried for each task and budget, and what to mistrust."""
    spec = gathered.spec
    head = Heading(2, "Tuning")
    if not spec.tuning.enabled:
        text = "Learning rates were not tuned: each method ran at the first rate of its own."
        return [head, Paragraph(text)]
    seeds = ", ".join(map(str, spec.tuning.seeds))
    intro = (
        f"Mean of the judged metric on the validation split, by learning rate; tuning seeds: "
        f"{seeds}, which no reported cell has. {CHOSEN} marks the rate at which the reported seeds "
        f"ran."
    )
    blocks: list[Block] = [head, Paragraph(intro)]
    warnings: list[Paragraph] = []
    for task in spec.tasks:
        for budget in spec.budgets:
            places = gathered.places(task.name, budget.label)
            rows = [row for place in places for row in tuning_rows(gathered, place)]
            if rows:
                blocks += [Heading(3, f"Tuning of {task.name}, {budget.label}"), _table(rows)]
                warnings += _warnings(rows)
    if len(blocks) == 2:
        blocks.append(Paragraph("No result of tuning is there."))
    return [*blocks, Bullets(tuple(warnings))] if warnings else blocks


def rate_text(rate: float) -> str:
    """Return a learning rate.

    >>> rate_text(0.0002), rate_text(0.004)
    ('2e-4', '4e-3')
    """
    mantissa, exponent = f"{rate:.1e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _mean(results: Sequence[CellResult], metric: str) -> float:
    values = [result.metrics.get(metric, math.nan) for result in results]
    return sum(values) / len(values)


def _table(rows: Sequence[TuningRow]) -> Table:
    rates = sorted({rate for row in rows for rate in row.values})
    scaled = any(row.scaling != 1 for row in rows)
    decimals = decimals_of([], [value for row in rows for value in row.values.values()])
    texts = [
        (
            row.place.method,
            *([f"{row.scaling:g}"] if scaled else []),
            *(_text(row, rate, decimals) for rate in rates),
        )
        for row in rows
    ]
    first = 2 if scaled else 1
    strong = {
        (r, first + rates.index(row.chosen))
        for r, row in enumerate(rows)
        if row.chosen in row.values and row.chosen is not None
    }
    names = ("method", "scaling") if scaled else ("method",)
    return Table((*names, *map(rate_text, rates)), tuple(texts), frozenset(strong))


def _text(row: TuningRow, rate: float, decimals: int) -> str:
    if rate not in row.values:
        return ""
    value = row.values[rate]
    text = with_interval(value, math.nan, decimals) if math.isfinite(value) else "broke"
    return f"{text} {CHOSEN}" if rate == row.chosen else text


def _warnings(rows: Sequence[TuningRow]) -> list[Paragraph]:
    warnings = []
    for row in rows:
        where = f"{row.place.method} on {row.place.task} at {row.place.budget}"
        if row.best is not None and row.is_at_edge:
            text = f"{where}: {rate_text(row.best)} is the best and at the edge of what was tried."
            warnings.append(Paragraph(f"{text} A better one may lie beyond.", lead="Edge."))
        others = [other for other in rows if other.place == row.place]
        if row.chosen is not None and row.best != row.chosen:
            best = next((o for o in others if o.best is not None), None)
            if best is not None and best.best is not None:
                text = f"{where} ran at {rate_text(row.chosen)}, though {rate_text(best.best)} "
                scaled = f"(scaling {best.scaling:g}) " if len(others) > 1 else ""
                warnings.append(
                    Paragraph(f"{text}{scaled}was better in tuning.", lead="Not the best.")
                )
    return warnings
