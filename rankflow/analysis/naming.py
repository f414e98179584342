"""Match the names that one model gives its layers with those of another around the same core.

An encoder's ``encoder.layer.0...`` is ``bert.encoder.layer.0...`` inside a classifier, and may have
any other beginning inside a module of the user's. Only the beginning differs, so one pair of
beginnings translates all names.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Path = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Renaming:
    """Two names of one module: what lies below is named the same in both.

    Attributes:
        theirs: Path of the shared core in their model; empty for the whole of it.
        ours: And in ours.
    """

    theirs: str
    ours: str

    def translate(self, name: str) -> str | None:
        """Return our name for one of theirs; None where it lies outside of the core.

        >>> Renaming(theirs="bert", ours="").translate("bert.encoder.layer.0.output.dense")
        'encoder.layer.0.output.dense'
        >>> Renaming(theirs="bert", ours="").translate("classifier")
        """
        if self.theirs and not name.startswith(f"{self.theirs}."):
            return None
        inner = name[len(self.theirs) + 1 :] if self.theirs else name
        return f"{self.ours}.{inner}" if self.ours else inner


def match_names(theirs: Iterable[str], ours: Iterable[str]) -> Renaming | None:
    """Return the renaming under which most of their names are ours; None where none is.

    Of equally good ones the shortest is taken, the same names before all.

    >>> match_names(["bert.layer.0.q", "bert.layer.1.q", "head"], ["layer.0.q", "layer.1.q"])
    Renaming(theirs='bert', ours='')
    >>> match_names(["layer.0.q"], ["layer.0.q", "layer.1.q"])
    Renaming(theirs='', ours='')
    """
    by_ending: dict[str, list[Path]] = {}
    for name in ours:
        path = tuple(name.split("."))
        by_ending.setdefault(path[-1], []).append(path)
    votes: Counter[Renaming] = Counter()
    for name in theirs:
        path = tuple(name.split("."))
        votes.update({_beginnings(path, other) for other in by_ending.get(path[-1], [])})
    return max(
        votes,
        key=lambda pair: (votes[pair], -len(pair.theirs) - len(pair.ours)),
        default=None,
    )


def _beginnings(theirs: Path, ours: Path) -> Renaming:
    """Cut the longest ending that two paths share."""
    shared = 0
    while shared < min(len(theirs), len(ours)) and theirs[-shared - 1] == ours[-shared - 1]:
        shared += 1
    return Renaming(".".join(theirs[: len(theirs) - shared]), ".".join(ours[: len(ours) - shared]))
