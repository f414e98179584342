"""What the view is given: a run's events in columns, the places of its sites, the colours.

An event names every site in each of its fields; here the sites are named once, and the fields are
columns over them. A float that JSON cannot spell is one of the strings ``"NaN"``, ``"Infinity"``
and ``"-Infinity"``, as in ``events.jsonl``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic_core import to_json

from rankflow.records import ComponentChange, RankEvent
from rankflow.report.layout import lay_out

Value = TypeVar("Value")
Column = list[Value | None]


@dataclass(frozen=True, slots=True)
class ChangeView:
    """What an event did to one site, for one reason.

    Attributes:
        site: Its place among the run's sites.
        born: Whether something was born, rather than pruned.
        magnitude: Whether it was the magnitude, rather than components.
        count: Number of components; 1 for a magnitude.
        reason: Why.
    """

    site: int
    born: bool
    magnitude: bool
    count: int
    reason: str


@dataclass(frozen=True, slots=True)
class EventView:
    """One event. A column has an entry for each site of the run, None where nothing is known.

    Attributes:
        index: Running number of the event.
        step: Optimizer steps taken before it.
        limit: Trainable adapter parameters that the budget allows from here on.
        spent_before: Trainable adapter parameters before the event.
        spent: Trainable adapter parameters after it.
        ranks_before: Rank before it.
        ranks: Rank after it.
        importance: Sum of the scores of the components before it.
        parameters: Trainable parameters after it.
        magnitudes: Whether a budgeted magnitude is trained after it.
        magnitude_change: Mean of ``|m / n - 1|`` before it.
        changes: What it did to the sites.
    """

    index: int
    step: int
    limit: int
    spent_before: int
    spent: int
    ranks_before: Column[int]
    ranks: Column[int]
    importance: Column[float]
    parameters: Column[int]
    magnitudes: Column[bool]
    magnitude_change: Column[float]
    changes: list[ChangeView]


@dataclass(frozen=True, slots=True)
class RunView:
    """Events of one run.

    Attributes:
        name: What the run is called.
        sites: Names of its sites.
        events: The events, in their order.
    """

    name: str
    sites: list[str]
    events: list[EventView]


@dataclass(frozen=True, slots=True)
class GridView:
    """Where each site stands.

    Attributes:
        rows: Label of each row, from the top.
        columns: Label of each column, from the left.
        groups: Number of each row's group.
        cells: Row, first column, and number of columns of each site, by its name.
    """

    rows: list[str]
    columns: list[str]
    groups: list[int]
    cells: dict[str, tuple[int, int, int]]


def view_run(name: str, events: Sequence[RankEvent]) -> RunView:
    """Return a run's events as the view takes them.

    Args:
        name: What the run is called.
        events: All of its events, or those that are new.
    """
    sites = list(dict.fromkeys(site for event in events for site in event.ranks))
    return RunView(name, sites, [_view_event(event, sites) for event in events])


def view_grid(names: Iterable[str]) -> GridView:
    """Return the places of the sites of one run, or of several runs together.

    >>> view_grid(["layers.0.q", "layers.0.v", "head"]).cells["head"]
    (1, 0, 2)
    """
    layout = lay_out(dict.fromkeys(names))
    cells = {site: (cell.row, cell.column, cell.span) for site, cell in layout.cells.items()}
    return GridView(list(layout.rows), list(layout.columns), list(layout.groups), cells)


def encode(value: Any) -> bytes:
    """Return a view, or a record of views, as strict JSON in UTF-8."""
    return to_json(value, inf_nan_mode="strings")


def _view_event(event: RankEvent, sites: Sequence[str]) -> EventView:
    return EventView(
        index=event.index,
        step=event.step,
        limit=event.limit,
        spent_before=event.spent_before,
        spent=event.spent,
        ranks_before=_column(event.ranks_before, sites),
        ranks=_column(event.ranks, sites),
        importance=_column(event.importance, sites),
        parameters=_column(event.parameters, sites),
        magnitudes=_column(event.magnitudes, sites),
        magnitude_change=_column(event.magnitude_change, sites),
        changes=_group(event.pruned, sites, born=False) + _group(event.born, sites, born=True),
    )


def _column(values: Mapping[str, Value], sites: Sequence[str]) -> Column[Value]:
    return [values.get(site) for site in sites]


def _group(
    changes: Iterable[ComponentChange], sites: Sequence[str], *, born: bool
) -> list[ChangeView]:
    """Count the changes of one kind and reason at one site; most are many components at once."""
    place = {site: index for index, site in enumerate(sites)}
    counts = Counter((place[c.site], c.component is None, c.reason) for c in changes)
    return [
        ChangeView(site, born, magnitude, count, reason)
        for (site, magnitude, reason), count in counts.items()
    ]
