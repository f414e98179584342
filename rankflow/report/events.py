"""The event log ``events.jsonl``: one JSON object per line, one line per event.

Each object has the fields of ``RankEvent`` and ``"schema": 1``. It is strict JSON: a float that
JSON cannot spell is one of the strings ``"NaN"``, ``"Infinity"`` and ``"-Infinity"``. Every other
float is written with the fewest digits that read back to the same float, so that reading returns
exactly the events that were written.

An event counts once the newline behind it is on disk. Text after the last newline is what a crash
left of an unfinished write: reading ignores it, and the next ``EventLog`` on the file removes it.
Any other line that is not an event is damage, and an error.
"""

import dataclasses
import os
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError
from pydantic_core import to_json

from rankflow.errors import RankFlowError
from rankflow.records import RankEvent
from rankflow.strict_json import parse_json

EVENTS_FILE: Final = "events.jsonl"
SCHEMA = 1

_REMEDY = "Restore the file from a copy, or delete this line to read the other events."
_EVENT_TYPE = TypeAdapter(RankEvent)


class EventLog:
    """A sink that appends each event to a file, durable before the call returns."""

    def __init__(self, path: str | Path, *, keep: int | None = None) -> None:
        """Open the log, and cut it back if the run resumes from an earlier point.

        Args:
            path: The file; it and its folder are made if they do not exist.
            keep: Events to keep from the start of the file: 0 starts afresh, and
                ``len(flow.history)`` goes on behind a restored engine. None keeps them all.

        Raises:
            RankFlowError: The file holds fewer than ``keep`` events.
        """
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            self._length = _length_of_events(self.path, keep)
            file.truncate(self._length)

    def __call__(self, event: RankEvent) -> None:
        """Append the event, and return once it is on disk; nothing is left open."""
        line = encode_event(event) + b"\n"
        with self.path.open("r+b") as file:
            file.truncate(self._length)  # what a failed write may have left
            file.seek(self._length)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._length += len(line)


def read_events(path: str | Path) -> list[RankEvent]:
    """Return the events of a log, exactly as they were written.

    Args:
        path: A file that an ``EventLog`` wrote. Text after its last newline is ignored.

    Raises:
        RankFlowError: A line is damaged, or of another schema.
    """
    lines = Path(path).read_bytes().split(b"\n")[:-1]
    return [_decode_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def read_run(folder: str | Path) -> list[RankEvent]:
    """Return the events of a run's folder, at least one.

    Raises:
        RankFlowError: It has no log of events, an empty one, or one that is damaged.
    """
    path = Path(folder) / EVENTS_FILE
    if not path.is_file():
        raise RankFlowError(f"{folder} holds no {EVENTS_FILE}; name the folder of a run")
    events = read_events(path)
    if not events:
        raise RankFlowError(f"{path} holds no event yet; look again after the first one")
    for number, event in enumerate(events, 1):
        _check(event, f"{path}, line {number}")
    return events


def encode_event(event: RankEvent) -> bytes:
    """Return the event as one strict JSON object in UTF-8, without a newline.

    >>> event = RankEvent(0, 10, 64, 64, 32, {"a": 2}, {"a": 1}, {"a": 0.1}, (), (), 0.5)
    >>> encode_event(event)[:40]
    b'{"schema":1,"index":0,"step":10,"limit":'
    """
    return to_json({"schema": SCHEMA} | dataclasses.asdict(event), inf_nan_mode="strings")


def decode_event(line: bytes) -> RankEvent:
    """Return the event that ``encode_event`` wrote.

    Raises:
        ValueError: The line is no JSON object, has another schema, or lacks a field.
    """
    fields: Any = parse_json(line)
    if not isinstance(fields, dict) or "schema" not in fields:
        raise ValueError("a JSON object with the key 'schema' was expected")
    if fields["schema"] != SCHEMA:
        raise ValueError(f"its schema is {fields['schema']!r}; this version reads {SCHEMA}")
    return _EVENT_TYPE.validate_python(fields)


def _check(event: RankEvent, place: str) -> None:
    """Check what is shown of a run relies on: there are sites, the same ones, and no rank below 0.

    Raises:
        RankFlowError: It is not so, though each value is of its type.
    """
    sites = event.ranks.keys()
    named = {change.site for change in event.pruned + event.born}.union(
        event.importance, event.magnitudes, event.parameters, event.magnitude_change
    )
    if not sites or event.ranks_before.keys() != sites or not named <= sites:
        raise RankFlowError(f"{place}: its parts name different sites. {_REMEDY}")
    counts = (event.index, event.step, event.limit, event.spent_before, event.spent)
    lowest = min(*counts, *event.ranks.values(), *event.ranks_before.values())
    if lowest < 0:
        raise RankFlowError(f"{place}: it counts {lowest}, below 0. {_REMEDY}")


def _decode_line(line: bytes, place: str) -> RankEvent:
    try:
        return decode_event(line)
    except ValueError as error:
        raise RankFlowError(
            f"{place}: not an event of RankFlow ({_reason_of(error)}). {_REMEDY}"
        ) from error


def _reason_of(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    faults = error.errors(include_url=False)
    return "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in faults)


def _length_of_events(path: Path, keep: int | None) -> int:
    """Return the bytes that the first ``keep`` events take, or all that are finished."""
    lines = path.read_bytes().split(b"\n")[:-1]
    if keep is not None and not 0 <= keep <= len(lines):
        raise RankFlowError(
            f"{path} holds {len(lines)} events, and {keep} are to be kept. Resume with the log of "
            "the run that wrote the checkpoint, or give the log another path."
        )
    return sum(len(line) + 1 for line in lines[:keep])
