"""The short form of a report, for a terminal."""

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from rankflow.ablation.records import CellResult
from rankflow.ablation.report.contents import verdicts_of
from rankflow.ablation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table
from rankflow.ablation.report.rows import gather, method_row
from rankflow.ablation.report.tables import overview
from rankflow.ablation.report.verdict_text import trouble_blocks, verdict_blocks
from rankflow.specs.ablation import AblationSpec


def render_terminal(spec: AblationSpec, results: Iterable[CellResult]) -> RenderableType:
    """Return the verdict over all tasks, what broke, and the judged metric of every method.

    Args:
        spec: The ablation.
        results: Its results, in any order.

    Returns:
        Something to print with rich.

    Raises:
        RankFlowError: One seed has two results at one place.
    """
    gathered = gather(spec, results)
    rows = {place: method_row(gathered, place) for place in gathered.tests}
    pooled, _ = verdicts_of(gathered)
    blocks = [
        *verdict_blocks(gathered, pooled),
        *trouble_blocks(gathered, list(rows.values())),
        overview(spec, rows),
    ]
    return Group(*_spaced(blocks))


def _spaced(blocks: Sequence[Block]) -> list[RenderableType]:
    spaced: list[RenderableType] = []
    for block in blocks:
        spaced += [_render(block), Text()]
    return spaced[:-1]


def _render(block: Block) -> RenderableType:
    match block:
        case Heading(_, text):
            return Text(text, "bold")
        case Paragraph():
            return _paragraph(block)
        case Bullets(items):
            return Text("\n").join([Text("• ") + _paragraph(item) for item in items])
        case Table():
            return _table(block)
        case Picture(_, caption, _):
            return Text(caption, "dim")


def _paragraph(paragraph: Paragraph) -> Text:
    return Text.assemble((f"{paragraph.lead} " if paragraph.lead else "", "bold"), paragraph.text)


def _table(table: Table) -> RenderableType:
    drawn = RichTable()
    for c, column in enumerate(table.columns):
        drawn.add_column(column, justify="left" if c < table.left else "right")
    for r, row in enumerate(table.rows):
        drawn.add_row(
            *(Text(text, "bold" if (r, c) in table.strong else "") for c, text in enumerate(row))
        )
    return Group(drawn, *(Text(note, "dim") for note in table.notes))
