"""All statistics of the comparisons, as a table."""

import math
from collections.abc import Sequence

from rankflow.ablation.report.document import Block, Heading, Paragraph, Table
from rankflow.ablation.report.numbers import NOTHING, change, probability
from rankflow.ablation.report.verdicts import Verdict
from rankflow.ablation.statistics.comparison import Comparison

_COLUMNS = (
    "ours - theirs",
    "budget",
    "task",
    "outcome",
    "difference",
    "low",
    "high",
    "p",
    "p (Holm)",
    "smallest p possible",
    "p (equivalent)",
    "margin",
    "d_z",
    "pairs",
    "diverged",
    "unpaired",
    "seeds for 80% power",
)


def pair_blocks(verdicts: Sequence[Verdict]) -> list[Block]:
    """Return the table of all comparisons; nothing without any."""
    rows = [_row(verdict, found) for verdict in verdicts for found in verdict.comparisons]
    if not rows:
        return []
    table = Table(columns=_COLUMNS, rows=tuple(rows), left=4, notes=_notes(verdicts))
    return [
        Heading(2, "Paired comparisons"),
        Paragraph(
            "Every row compares two methods over the tasks and seeds that both finished. Rows of "
            "a single task are there to show where a difference comes from; the verdict is the "
            "row of all tasks."
        ),
        table,
    ]


def _row(verdict: Verdict, found: Comparison) -> tuple[str, ...]:
    return (
        f"{found.ours} - {found.theirs}",
        verdict.budget,
        verdict.task or (found.tasks[0] if len(found.tasks) == 1 else f"all {len(found.tasks)}"),
        found.outcome,
        *(change(value, found.relative) for value in (found.mean, found.low, found.high)),
        probability(found.p),
        probability(found.p_holm),
        probability(found.p_attainable_holm),
        probability(found.p_equivalent),
        change(found.margin, found.relative).lstrip("+"),
        f"{found.d_z:+.2f}" if math.isfinite(found.d_z) else NOTHING,
        str(found.n),
        str(found.broken),
        str(found.unpaired),
        NOTHING if found.seeds_needed is None else f"{found.seeds_needed:,}",
    )


def _notes(verdicts: Sequence[Verdict]) -> tuple[str, ...]:
    if any(verdict.relative for verdict in verdicts):
        return (
            "Differences are ratios of the scores (geometric means of ours over theirs), in per "
            "cent; negative where ours is the lower one.",
        )
    return ("Differences are in the unit of the metric; negative where ours is the lower one.",)
