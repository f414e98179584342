import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankflow.errors import RankFlowError
from rankflow.records import ComponentChange, RankEvent
from rankflow.report.events import EventLog, decode_event, encode_event, read_events

COUNTS = st.integers(0, 2**53)
CHANGES = st.lists(
    st.builds(ComponentChange, st.text(), COUNTS | st.none(), st.floats(), st.text()), max_size=3
).map(tuple)
RANKS = st.dictionaries(st.text(), COUNTS, max_size=4)
EVENTS = st.builds(
    RankEvent,
    index=COUNTS,
    step=COUNTS,
    limit=COUNTS,
    spent_before=COUNTS,
    spent=COUNTS,
    ranks_before=RANKS,
    ranks=RANKS,
    importance=st.dictionaries(st.text(), st.floats(), max_size=4),
    pruned=CHANGES,
    born=CHANGES,
    seconds=st.floats(0, 1e6),
    magnitudes=st.dictionaries(st.text(), st.booleans(), max_size=4),
)


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def write_log(path: Path, events: list[RankEvent]) -> None:
    log = EventLog(path)
    for event in events:
        log(event)


@pytest.fixture
def events(event: RankEvent) -> list[RankEvent]:
    return [replace(event, index=index, step=10 * index) for index in range(4)]


@given(EVENTS)
def test_an_event_survives_a_round_trip_bit_for_bit(event):
    # repr tells -0.0 from 0.0, calls NaN equal to itself, and shows the order of the sites.
    assert repr(decode_event(encode_event(event))) == repr(event)


@given(EVENTS)
def test_a_line_is_strict_json_with_a_schema(event):
    line = encode_event(event)
    assert b"\n" not in line
    assert json.loads(line, parse_constant=refuse_constant)["schema"] == 1


def test_a_log_returns_the_events_in_order(tmp_path, events):
    write_log(tmp_path / "run" / "events.jsonl", events)
    assert read_events(tmp_path / "run" / "events.jsonl") == events


def test_an_event_is_in_the_file_at_once(tmp_path, event):
    log = EventLog(tmp_path / "events.jsonl")
    log(event)
    assert read_events(tmp_path / "events.jsonl") == [event]


def test_opening_a_log_again_goes_on_behind_its_last_event(tmp_path, events):
    write_log(tmp_path / "events.jsonl", events[:3])
    write_log(tmp_path / "events.jsonl", events[3:])
    assert read_events(tmp_path / "events.jsonl") == events


@pytest.mark.parametrize("keep", [0, 2, 4])
def test_a_resumed_log_is_cut_back_to_the_events_to_keep(tmp_path, events, event, keep):
    write_log(tmp_path / "events.jsonl", events)
    log = EventLog(tmp_path / "events.jsonl", keep=keep)
    log(event)
    assert read_events(tmp_path / "events.jsonl") == [*events[:keep], event]


@pytest.mark.parametrize("keep", [5, -1])
def test_a_log_with_too_few_events_is_refused_and_left_alone(tmp_path, events, keep):
    write_log(tmp_path / "events.jsonl", events)
    with pytest.raises(RankFlowError, match=f"holds 4 events, and {keep} are to be kept"):
        EventLog(tmp_path / "events.jsonl", keep=keep)
    assert read_events(tmp_path / "events.jsonl") == events


def test_a_write_cut_off_at_any_byte_loses_only_the_last_event(tmp_path, events):
    path = tmp_path / "events.jsonl"
    write_log(path, events)
    whole = path.read_bytes()
    start_of_last = whole.rstrip(b"\n").rindex(b"\n") + 1
    for end in range(start_of_last, len(whole)):
        path.write_bytes(whole[:end])
        assert read_events(path) == events[:3]


def test_the_next_log_removes_what_a_crash_left(tmp_path, events):
    path = tmp_path / "events.jsonl"
    write_log(path, events[:3])
    path.write_bytes(path.read_bytes()[:-1])
    write_log(path, events[3:])
    assert read_events(path) == [*events[:2], events[3]]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (b"", "Expecting value"),
        (b"[1]", "the key 'schema'"),
        (b'{"index": 0}', "the key 'schema'"),
        (b'{"schema": 2}', "its schema is 2; this version reads 1"),
        (b'{"schema": 1, "index": 0}', "step: Field required"),
        (b"\xff\xff", "codec can't decode"),
    ],
)
def test_a_damaged_line_is_named_with_its_number_and_a_remedy(tmp_path, events, damage, reason):
    path = tmp_path / "events.jsonl"
    lines = [encode_event(event) for event in events]
    path.write_bytes(b"\n".join([lines[0], damage, *lines[2:], b""]))
    with pytest.raises(RankFlowError) as error:
        read_events(path)
    assert f"{path}, line 2: " in str(error.value)
    assert reason in str(error.value)
    assert "delete this line" in str(error.value)


def test_a_field_of_the_wrong_type_is_named(tmp_path, event):
    fields = json.loads(encode_event(event))
    fields["pruned"][1]["component"] = "first"
    (tmp_path / "events.jsonl").write_text(json.dumps(fields) + "\n")
    with pytest.raises(RankFlowError, match=r"pruned\.1\.component: Input should be a valid int"):
        read_events(tmp_path / "events.jsonl")


def test_a_line_without_magnitudes_is_read_as_an_event_whose_budget_did_not_cover_them(event):
    fields = json.loads(encode_event(event))
    del fields["magnitudes"]
    assert decode_event(json.dumps(fields).encode()) == event
    assert event.magnitudes == {}


def test_what_a_failed_write_left_goes_with_the_next_event(tmp_path, events):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log(events[0])
    with path.open("ab") as file:
        file.write(b'{"schema":1,"ind')  # the disk was full
    log(events[1])
    assert read_events(path) == events[:2]
