"""What a report is made of, before it is Markdown, HTML or a terminal's lines.

All texts are plain: a renderer escapes what its format would take for markup.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Heading:
    """A heading.

    Attributes:
        level: 1 for the title, 2 for a section, 3 and 4 for its parts.
        text: What it says.
    """

    level: int
    text: str


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph.

    Attributes:
        text: What it says.
        lead: Words before it that stand out; empty for none.
    """

    text: str
    lead: str = ""


@dataclass(frozen=True, slots=True)
class Bullets:
    """A list of paragraphs."""

    items: tuple[Paragraph, ...]


@dataclass(frozen=True, slots=True)
class Table:
    """A table, with numbers set to the right.

    Attributes:
        columns: Heading of each column.
        rows: Texts of each row, as many as there are columns.
        strong: Row and column of the cells that stand out.
        left: Columns that are set to the left, counted from the first.
        notes: What stands under it, such as the legend of its signs.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: frozenset[tuple[int, int]] = frozenset()
    left: int = 1
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Picture:
    """A figure.

    Attributes:
        name: Of its file, without ``.png``.
        caption: What it shows, and how to read it.
        png: The file's content.
    """

    name: str
    caption: str
    png: bytes


Block = Heading | Paragraph | Bullets | Table | Picture
