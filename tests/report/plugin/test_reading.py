from dataclasses import replace

import pytest
from tensorboard.context import RequestContext

from rankflow.report.plugin.reading import EventReader


@pytest.fixture
def read(load):
    return lambda folder: EventReader(load(folder), RequestContext(), "")


def renumber(event, indices, **changes):
    return [replace(event, index=i, step=10 * i, **changes) for i in indices]


def test_all_of_300_events_come_back_as_they_were_written(tmp_path, event, write, read):
    events = renumber(event, range(300))
    write(tmp_path / "run", events)
    reader = read(tmp_path)
    assert reader.runs() == {"run": list(range(300))}
    assert reader.events("run", list(range(300))) == events


def test_some_events_are_read_on_request(tmp_path, event, write, read):
    write(tmp_path / "run", renumber(event, range(5)))
    assert [e.index for e in read(tmp_path).events("run", [3, 4])] == [3, 4]


def test_a_resumed_run_replaces_what_it_repeats_and_drops_what_it_left_behind(
    tmp_path, event, write, read
):
    write(tmp_path / "run", renumber(event, range(8)))
    write(tmp_path / "run", renumber(event, range(4, 6), spent=1))
    reader = read(tmp_path)
    assert reader.runs() == {"run": [0, 1, 2, 3, 4, 5]}
    spent = [e.spent for e in reader.events("run", list(range(6)))]
    assert spent == [event.spent] * 4 + [1, 1]


def test_runs_are_sorted_and_those_without_events_left_out(tmp_path, event, write, read):
    for name in ("b", "a"):
        write(tmp_path / name, renumber(event, [0]))
    write(tmp_path / "none", [])
    assert list(read(tmp_path).runs()) == ["a", "b"]
