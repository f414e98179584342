"""A document as one HTML file that needs no other."""

import base64
import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Final

from rankflow.ablation.report.document import Block, Bullets, Heading, Paragraph, Picture, Table

_CONTENTS_LEVEL: Final = 2


def render_html(document: Sequence[Block], title: str) -> str:
    """Return the document as HTML, with its style and its figures within.

    Args:
        document: What it says.
        title: Title of the window.
    """
    anchors = _anchors(document)
    body = "\n".join(_render(block, anchors.get(i, "")) for i, block in enumerate(document))
    style = resources.files("rankflow.ablation.report").joinpath("style.css").read_text("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"{_contents(document, anchors)}\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _anchors(document: Sequence[Block]) -> dict[int, str]:
    """Return the anchor of each heading, by its place; no two are alike."""
    anchors: dict[int, str] = {}
    for place, block in enumerate(document):
        if isinstance(block, Heading):
            word = re.sub(r"[^a-z0-9]+", "-", block.text.lower()).strip("-")
            anchors[place] = f"{word}-{place}" if word in anchors.values() else word
    return anchors


def _contents(document: Sequence[Block], anchors: dict[int, str]) -> str:
    links = [
        f'<li><a href="#{anchors[place]}">{escape(block.text)}</a></li>'
        for place, block in enumerate(document)
        if isinstance(block, Heading) and block.level == _CONTENTS_LEVEL
    ]
    return f"<nav><ul>{''.join(links)}</ul></nav>"


def _render(block: Block, anchor: str) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="{anchor}">{escape(text)}</h{level}>'
        case Paragraph():
            return f"<p>{_inner(block)}</p>"
        case Bullets(items):
            return f"<ul>\n{_lines('<li>{}</li>', map(_inner, items))}\n</ul>"
        case Table():
            return _table(block)
        case Picture(name, caption, png):
            data = base64.b64encode(png).decode()
            return (
                f'<figure>\n<img alt="{escape(name)}" src="data:image/png;base64,{data}">\n'
                f"<figcaption>{escape(caption)}</figcaption>\n</figure>"
            )


def _inner(paragraph: Paragraph) -> str:
    lead = f"<strong>{escape(paragraph.lead)}</strong> " if paragraph.lead else ""
    return lead + escape(paragraph.text)


def _table(table: Table) -> str:
    head = "".join(_cell("th", column, c, table) for c, column in enumerate(table.columns))
    rows = [
        "".join(
            _cell("td", text, c, table, strong=(r, c) in table.strong) for c, text in enumerate(row)
        )
        for r, row in enumerate(table.rows)
    ]
    return (
        f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        f"{_lines('<tr>{}</tr>', rows)}\n</tbody>\n</table></div>\n"
        + _lines('<p class="note">{}</p>', map(escape, table.notes))
    )


def _cell(tag: str, text: str, column: int, table: Table, strong: bool = False) -> str:
    side = ' class="left"' if column < table.left else ""
    inner = f"<strong>{escape(text)}</strong>" if strong else escape(text)
    return f"<{tag}{side}>{inner}</{tag}>"


def _lines(pattern: str, texts: Iterable[str]) -> str:
    return "\n".join(pattern.format(text) for text in texts)
