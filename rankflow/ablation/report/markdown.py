"""A document as Markdown, as GitHub shows it."""

import re
from collections.abc import Iterable
from typing import Final

from rankflow.ablation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table

FIGURES: Final = "figures"

_MARKUP: Final = re.compile(r"([\\`*_\[\]<>|~])")


def render_markdown(document: Iterable[Block]) -> str:
    r"""Return the document as Markdown; figures are ``figures/NAME.png``.

    >>> print(render_markdown([Heading(2, "Tuning"), Paragraph("a * b", lead="Note:")]), end="")
    ## Tuning
    <BLANKLINE>
    **Note:** a \* b
    """
    return "\n\n".join(_render(block) for block in document) + "\n"


def _render(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escape(text)}"
        case Paragraph():
            return _paragraph(block)
        case Bullets(items):
            return "\n".join(f"- {_paragraph(item)}" for item in items)
        case Table():
            return _table(block)
        case Picture(name, caption, _):
            return f"![{_escape(caption)}]({FIGURES}/{name}.png)\n\n*{_escape(caption)}*"


def _paragraph(paragraph: Paragraph) -> str:
    lead = f"**{_escape(paragraph.lead)}** " if paragraph.lead else ""
    return lead + _escape(paragraph.text)


def _table(table: Table) -> str:
    rules = [":--" if column < table.left else "--:" for column in range(len(table.columns))]
    lines = [_row([_escape(column) for column in table.columns]), _row(rules)]
    for r, row in enumerate(table.rows):
        lines.append(
            _row(
                [
                    f"**{_escape(text)}**" if (r, c) in table.strong else _escape(text)
                    for c, text in enumerate(row)
                ]
            )
        )
    return "\n\n".join(["\n".join(lines), *map(_escape, table.notes)])


def _row(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _escape(text: str) -> str:
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
