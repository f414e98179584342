"""What was declared to be compared, judged at every budget."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from rankflow.ablation.report.rows import Gathered
from rankflow.ablation.statistics.comparison import Comparison
from rankflow.ablation.statistics.interaction import Interaction, interact
from rankflow.ablation.statistics.table import ScoreTable
from rankflow.ablation.statistics.verdict import compare_all
from rankflow.specs.ablation import HIGHER_IS_BETTER, SHARES

METRICS: Final[Mapping[str, str]] = {
    "nll": "test NLL",
    "accuracy": "test accuracy",
    "perplexity": "test perplexity",
    "excess": "excess loss",
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """The comparisons at one budget, over all tasks or on one.

    Attributes:
        budget: Label of the budget.
        task: The task; empty for all tasks together.
        comparisons: Those that have at least one pair, in the order declared.
        unmeasured: Those that have none.
        relative: Whether differences are log ratios.
        interaction: None if none is declared, or some method was not measured.
    """

    budget: str
    task: str
    comparisons: tuple[Comparison, ...]
    unmeasured: tuple[tuple[str, str], ...]
    relative: bool
    interaction: Interaction | None


def judge(gathered: Gathered, budget: str, task: str = "") -> Verdict:
    """Judge every declared comparison at a budget, together.

    Args:
        gathered: The results.
        budget: Label of the budget.
        task: One task; empty for all of them.
    """
    spec = gathered.spec
    table = score_table(gathered, budget, task)
    in_unit = table.relative or spec.judge in SHARES
    margin = spec.margin if in_unit else _as_share(table, spec.margin)
    measurable = [pair for pair in spec.compare if _share_cells(table, pair)]
    found = compare_all(table, measurable, margin=margin, alpha=spec.alpha) if measurable else []
    return Verdict(
        budget=budget,
        task=task,
        comparisons=tuple(found),
        unmeasured=tuple(pair for pair in spec.compare if pair not in measurable),
        relative=table.relative,
        interaction=_interaction(gathered, table),
    )


def score_table(gathered: Gathered, budget: str, task: str = "") -> ScoreTable:
    """Return the judged metric of every finished cell at a budget.

    Scores are compared by ratio, shares by difference; so is what is not positive everywhere.

    Args:
        gathered: The results.
        budget: Label of the budget.
        task: One task; empty for all of them.
    """
    metric = gathered.spec.judge
    values = {
        (place.method, place.task, result.cell.seed): result.metrics[metric]
        for place, results in gathered.tests.items()
        for result in results
        if place.budget == budget
        and task in ("", place.task)
        and result.status == "done"
        and metric in result.metrics
    }
    is_positive = all(value > 0 for value in values.values() if math.isfinite(value))
    return ScoreTable(
        values,
        metric=METRICS[metric],
        higher_is_better=HIGHER_IS_BETTER[metric],
        relative=metric not in SHARES and is_positive,
    )


def _share_cells(table: ScoreTable, methods: Collection[str]) -> bool:
    """Whether there is a task and a seed at which all of the methods were measured."""
    cells = [{(t, s) for m, t, s in table.values if m == method} for method in methods]
    return bool(set.intersection(*cells))


def _as_share(table: ScoreTable, share: float) -> float:
    """Return a share of the usual score, in the metric's unit."""
    sizes = [abs(value) for value in table.values.values() if math.isfinite(value)]
    return share * (sum(sizes) / len(sizes)) if any(sizes) else share


def _interaction(gathered: Gathered, table: ScoreTable) -> Interaction | None:
    spec = gathered.spec
    if spec.interaction is None or not _share_cells(table, spec.interaction):
        return None
    neither, first, second, both = spec.interaction
    return interact(
        table,
        both=both,
        one_only=first,
        other_only=second,
        neither=neither,
        level=1 - spec.alpha,
    )
