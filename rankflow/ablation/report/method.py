"""What a report has to know of a method."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MethodWords:
    """A method in words.

    Attributes:
        summary: One line: what it is, and whose implementation.
        source: The paper; empty for none.
        size_name: What its size is called, such as ``rank``; empty where it has none.
    """

    summary: str
    source: str = ""
    size_name: str = ""
