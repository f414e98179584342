"""The tables of methods: quality at a glance, then what each costs."""

import math
from collections.abc import Mapping, Sequence
from typing import Final

from rankflow.ablation.records import Place
from rankflow.ablation.report.document import Block, Heading, Paragraph, Table
from rankflow.ablation.report.numbers import (
    NOTHING,
    decimals_of,
    duration,
    megabytes,
    share_range,
    significant,
    times,
    whole_range,
    with_interval,
)
from rankflow.ablation.report.rows import MethodRow, best_row
from rankflow.ablation.report.verdicts import METRICS
from rankflow.ablation.statistics.spread import Spread
from rankflow.specs.ablation import HIGHER_IS_BETTER, AblationSpec

EXCEEDS: Final = "†"
MISSES: Final = "‡"

_BOLD: Final = (
    "Bold: the best mean of those within the budget that finished most seeds and diverged in none. "
    "It describes the sample, and is no claim that the method is better."
)

Rows = Mapping[Place, MethodRow]


def overview(spec: AblationSpec, rows: Rows) -> Table:
    """Return the judged metric of every method, with a column for each task and budget."""
    columns = [(task.name, budget.label) for task in spec.tasks for budget in spec.budgets]
    texts, strong = [], set()
    for c, (task, budget) in enumerate(columns, 1):
        column = [rows[Place(task, budget, method)] for method in spec.methods]
        texts.append(_quality_texts(column))
        best = best_row(column, spec)
        strong |= {(column.index(best), c)} if best else set()
    return Table(
        columns=("method", *(f"{task}, {budget}" for task, budget in columns)),
        rows=tuple(zip(spec.methods, *texts, strict=True)),
        strong=frozenset(strong),
        notes=(_BOLD, *_notes(spec, list(rows.values()))),
    )


def method_blocks(spec: AblationSpec, rows: Rows, sizes: Mapping[str, str]) -> list[Block]:
    """Return two tables for each task and budget: what a method reaches, and what it takes.

    Args:
        spec: The ablation.
        rows: The row of every place.
        sizes: What each method's size is called, by method; empty where it has none.
    """
    better = "higher" if HIGHER_IS_BETTER[spec.judge] else "lower"
    blocks: list[Block] = [
        Heading(2, "Methods"),
        Paragraph(
            f"Means over seeds with {100 * (1 - spec.alpha):g}% intervals of the mean; for "
            f"{METRICS[spec.judge]} {better} is better. An interval shows how far one method "
            f"scatters; whether two differ is for the verdict, which pairs them. {_BOLD} Times, "
            f"memory and inference are medians over seeds; inference is the time of one forward "
            f"pass as a multiple of the untouched base model's."
        ),
    ]
    for task in spec.tasks:
        for budget in spec.budgets:
            chosen = [rows[Place(task.name, budget.label, method)] for method in spec.methods]
            blocks.append(Heading(3, f"{task.name}, {budget.label}"))
            blocks += [_reached(spec, chosen), _taken(spec, chosen, sizes)]
    return blocks


def _reached(spec: AblationSpec, rows: Sequence[MethodRow]) -> Table:
    others = list(dict.fromkeys(name for row in rows for name in row.others))
    measure = next((row.forgetting for row in rows if row.forgetting), "")
    columns = {
        METRICS[spec.judge]: _quality_texts(rows),
        **{_title(name): _other_texts(rows, name) for name in others},
        "of budget": [_share(row) for row in rows],
        "inference as trained": [times(row.unmerged) for row in rows],
        "inference merged": [_merged(row) for row in rows],
        "step (CPU)": [duration(row.cpu_step) for row in rows],
        "step (wall)": [duration(row.step) for row in rows],
        "peak memory of a step": [megabytes(row.peak_bytes) for row in rows],
        **({f"{measure} before → after": [_forgetting(row) for row in rows]} if measure else {}),
        "seeds": [f"{len(row.seeds)} of {row.expected}" for row in rows],
    }
    best = best_row(rows, spec)
    return Table(
        columns=("method", *columns),
        rows=tuple(zip((row.place.method for row in rows), *columns.values(), strict=True)),
        strong=frozenset({(rows.index(best), 1)} if best else ()),
        notes=_notes(spec, rows),
    )


def _taken(spec: AblationSpec, rows: Sequence[MethodRow], sizes: Mapping[str, str]) -> Table:
    scaled = any(scaling != 1 for row in rows for scaling in row.scalings)
    columns = {
        "size": [_size(row, sizes.get(row.place.method, "")) for row in rows],
        "final parameters": [whole_range([p.final for p in r.parameters]) for r in rows],
        "peak": [whole_range([p.peak for p in r.parameters]) for r in rows],
        "of budget at the peak": [
            share_range([p.peak for p in r.parameters], r.budget) for r in rows
        ],
        "stored": [whole_range([p.stored for p in r.parameters if p.stored]) for r in rows],
        "learning rate": [_listed(row.rates) for row in rows],
        **({"scaling": [_listed(row.scalings) for row in rows]} if scaled else {}),
    }
    return Table(
        columns=("method", *columns),
        rows=tuple(zip((row.place.method for row in rows), *columns.values(), strict=True)),
        notes=_parameter_notes(rows),
    )


def _quality_texts(rows: Sequence[MethodRow]) -> list[str]:
    spreads = [row.quality for row in rows]
    decimals = decimals_of([_half(s) for s in spreads], [s.mean for s in spreads])
    return [
        _quality(row, with_interval(s.mean, _half(s), decimals))
        for row, s in zip(rows, spreads, strict=True)
    ]


def _quality(row: MethodRow, text: str) -> str:
    if row.status != "done":
        return row.status
    if row.quality.broken and not row.quality.n:
        return "diverged"
    marks = (EXCEEDS if row.exceeds else "") + (MISSES if row.misses else "")
    finished = row.quality.n + row.quality.broken
    broken = f" ({row.quality.broken} of {finished} diverged)" if row.quality.broken else ""
    return text + broken + (f" {marks}" if marks else "")


def _other_texts(rows: Sequence[MethodRow], name: str) -> list[str]:
    spreads = [row.others.get(name, Spread(math.nan, math.nan, math.nan, 0, 0)) for row in rows]
    decimals = decimals_of([_half(s) for s in spreads], [s.mean for s in spreads])
    return ["diverged" if s.broken else with_interval(s.mean, math.nan, decimals) for s in spreads]


def _half(spread: Spread) -> float:
    return (spread.high - spread.low) / 2


def _title(name: str) -> str:
    return METRICS.get(name, name.replace("_", " "))


def _share(row: MethodRow) -> str:
    marks = (EXCEEDS if row.exceeds else "") + (MISSES if row.misses else "")
    share = share_range([p.final for p in row.parameters], row.budget)
    return f"{share} {marks}" if marks else share


def _merged(row: MethodRow) -> str:
    return "cannot be merged" if row.unmergeable else times(row.merged)


def _forgetting(row: MethodRow) -> str:
    if row.before is None or not row.forgetting:
        return NOTHING
    after = "diverged" if row.after.broken else significant(row.after.mean, 4)
    return f"{significant(row.before, 4)} → {after}"


def _size(row: MethodRow, name: str) -> str:
    sizes = sorted({p.size for p in row.parameters if p.size is not None})
    return f"{name} {whole_range(sizes)}".strip() if sizes else NOTHING


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3g}" for value in values) or NOTHING


def _notes(spec: AblationSpec, rows: Sequence[MethodRow]) -> tuple[str, ...]:
    notes = []
    if any(row.exceeds for row in rows):
        notes.append(f"{EXCEEDS} ended above the budget.")
    if any(row.misses for row in rows):
        notes.append(f"{MISSES} ended more than 5% below the budget.")
    factors = {
        method: factor
        for method in spec.methods
        if (factor := spec.variant(method).factor or 1) != 1
    }
    if factors:
        listed = ", ".join(f"{method} {factor:g}x" for method, factor in factors.items())
        notes.append(f"Controls with another budget: {listed} the ablation's.")
    return tuple(notes)


def _parameter_notes(rows: Sequence[MethodRow]) -> tuple[str, ...]:
    budgets = sorted({p.budget for row in rows for p in row.parameters})
    heads = sorted({p.head for row in rows for p in row.parameters})
    notes = []
    if budgets:
        notes.append(f"Budget: {' or '.join(f'{b:,}' for b in budgets)} parameters.")
    if any(heads):
        listed = " or ".join(f"{head:,}" for head in heads)
        notes.append(f"A task head of {listed} parameters trains with it and is not counted.")
    return tuple(notes)
