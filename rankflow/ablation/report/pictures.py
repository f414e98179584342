"""The figures of a report."""

from collections.abc import Mapping, Sequence

from rankflow.ablation.report.document import Block
from rankflow.ablation.report.rows import Gathered, MethodRow, Place
from rankflow.ablation.report.verdicts import Verdict


def picture_blocks(
    gathered: Gathered,
    rows: Mapping[Place, MethodRow],
    pooled: Sequence[Verdict],
    by_task: Sequence[Verdict],
) -> list[Block]:
    """Return the figures for which there are numbers."""
    return []
