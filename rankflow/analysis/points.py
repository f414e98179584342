"""The points of a run: how far each weight has moved at each checkpoint."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rankflow.analysis.checkpoints import Checkpoint
from rankflow.analysis.directions import Change, magnitude_direction_change
from rankflow.analysis.weights import Weights, read_pairs
from rankflow.errors import RankFlowError
from rankflow.report.layout import parse_site
from rankflow.specs.reading import suggest


@dataclass(frozen=True, slots=True)
class Point:
    """How far one weight has moved at one moment.

    Attributes:
        site: The layer's name in the base model.
        moment: Place of the checkpoint among those of its run.
        change: How far it moved.
    """

    site: str
    moment: int
    change: Change


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured of one fine-tuning run.

    Attributes:
        name: Of the run.
        folder: Where it is.
        moments: Its checkpoints, in order.
        sites: The weights that it moved, in the model's order.
        points: A point for each of them at each moment, moment by moment.
    """

    name: str
    folder: Path
    moments: tuple[Checkpoint, ...]
    sites: tuple[str, ...]
    points: tuple[Point, ...]


def choose_sites(base: Weights, match: str | None) -> frozenset[str]:
    """Return the layers to compare: those that match, or all but embeddings.

    Args:
        base: The pretrained model.
        match: A regular expression that is searched for in the layers' names, or None. One that
            finds an embedding, or the output layer of a language model, brings it in.

    Raises:
        RankFlowError: It is no regular expression, or nothing matches.
    """
    if match is None:
        return frozenset(base.layers.keys() - base.embeddings)
    try:
        pattern = re.compile(match)
    except re.error as error:
        raise RankFlowError(
            f"--match '{match}' is not a regular expression: {error}; escape what is meant as it "
            "stands by a backslash"
        ) from error
    chosen = frozenset(name for name in base.layers if pattern.search(name))
    if not chosen:
        raise RankFlowError(
            f"--match '{match}' matches none of the base model's {len(base.layers)} weights; "
            f"{suggest(match, _kinds(base.layers))}"
        )
    return chosen


def measure_run(
    name: str,
    folder: Path,
    checkpoints: Sequence[Checkpoint],
    base: Weights,
    wanted: frozenset[str],
) -> Run:
    """Measure the weights that a run moved, at each of its checkpoints.

    One that has not moved yet, or that an adapter no longer adapts since its rank fell to 0, is a
    point without change. What a run ended with is left out where one of its checkpoints is the
    same.

    Raises:
        RankFlowError: A checkpoint cannot be read, or the run moved none of the wanted weights.
    """
    measured: list[dict[str, Change]] = []
    moments: list[Checkpoint] = []
    for checkpoint in checkpoints:
        changes = {
            pair.site: magnitude_direction_change(pair.before, pair.after).beyond_rounding()
            for pair in read_pairs(base, checkpoint, wanted)
        }
        if checkpoint.step is None and any(_is_same(changes, other) for other in measured):
            continue
        measured.append(changes)
        moments.append(checkpoint)
    norms = {site: change.norm for changes in measured for site, change in _moved(changes).items()}
    if not norms:
        raise RankFlowError(
            f"{folder} has moved none of the {len(wanted)} weights that are compared: it is not "
            "trained, or it trained others; widen --match, or leave the run out"
        )
    sites = tuple(site for site in base.layers if site in norms)
    points = [
        Point(site, moment, changes.get(site, Change(dM=0.0, dD=0.0, norm=norms[site])))
        for moment, changes in enumerate(measured)
        for site in sites
    ]
    return Run(name, folder, tuple(moments), sites, tuple(points))


def _is_same(one: dict[str, Change], other: dict[str, Change]) -> bool:
    one, other = _moved(one), _moved(other)
    return one.keys() == other.keys() and all(
        change.is_close_to(other[site]) for site, change in one.items()
    )


def _moved(changes: dict[str, Change]) -> dict[str, Change]:
    return {site: change for site, change in changes.items() if not change.is_nothing}


def _kinds(sites: Iterable[str]) -> list[str]:
    return sorted({".".join(parse_site(site).type) or site for site in sites})
