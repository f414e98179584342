"""The whole report as one document."""

from collections.abc import Iterable, Mapping

from rankflow.ablation.records import CellResult
from rankflow.ablation.report.document import Block, Heading, Paragraph
from rankflow.ablation.report.making import making_blocks
from rankflow.ablation.report.method import MethodWords
from rankflow.ablation.report.pairs_table import pair_blocks
from rankflow.ablation.report.pictures import picture_blocks
from rankflow.ablation.report.rows import Gathered, gather, method_row
from rankflow.ablation.report.tables import method_blocks, overview
from rankflow.ablation.report.tuning import tuning_blocks
from rankflow.ablation.report.verdict_text import (
    task_verdict_blocks,
    trouble_blocks,
    verdict_blocks,
)
from rankflow.ablation.report.verdicts import Verdict, judge
from rankflow.specs.ablation import AblationSpec


def compose(
    spec: AblationSpec, results: Iterable[CellResult], methods: Mapping[str, MethodWords]
) -> list[Block]:
    """Return what there is to say about an ablation, finished or not.

    Args:
        spec: The ablation.
        results: Its results, in any order.
        methods: Each method in words, by name.

    Raises:
        RankFlowError: One seed has two results at one place.
    """
    gathered = gather(spec, results)
    rows = {place: method_row(gathered, place) for place in gathered.tests}
    pooled, by_task = verdicts_of(gathered)
    sizes = {name: words.size_name for name, words in methods.items()}
    return [
        *head_blocks(spec),
        *verdict_blocks(gathered, pooled),
        *trouble_blocks(gathered, list(rows.values())),
        *task_verdict_blocks(gathered, by_task),
        Heading(2, "Quality at a glance"),
        overview(spec, rows),
        *picture_blocks(gathered, rows, pooled, by_task),
        *method_blocks(spec, rows, sizes),
        *pair_blocks(_interleave(pooled, by_task)),
        *tuning_blocks(gathered),
        *making_blocks(gathered, methods),
    ]


def head_blocks(spec: AblationSpec) -> list[Block]:
    """Return the title, and what the ablation asks."""
    title = Heading(1, f"Ablation {spec.name}")
    return [title, Paragraph(spec.description)] if spec.description else [title]


def verdicts_of(gathered: Gathered) -> tuple[list[Verdict], list[Verdict]]:
    """Return the verdicts over all tasks, and on each task; none of these for a single task."""
    spec = gathered.spec
    budgets = [budget.label for budget in spec.budgets]
    tasks = [task.name for task in spec.tasks] if len(spec.tasks) > 1 else []
    pooled = [judge(gathered, budget) for budget in budgets]
    return pooled, [judge(gathered, budget, task) for budget in budgets for task in tasks]


def _interleave(pooled: list[Verdict], by_task: list[Verdict]) -> list[Verdict]:
    return [
        verdict
        for whole in pooled
        for verdict in (whole, *(own for own in by_task if own.budget == whole.budget))
    ]
