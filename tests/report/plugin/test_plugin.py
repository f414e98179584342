import json
from dataclasses import replace

import pytest
from tensorboard.plugins.base_plugin import TBContext
from torch.utils.tensorboard import SummaryWriter
from werkzeug.test import Client

from rankflow.report.plugin.plugin import RankFlowPlugin
from rankflow.report.tensorboard import event_summary
from rankflow.report.view.data import encode, view_grid, view_run
from rankflow.report.view.script import view_script


@pytest.fixture
def ask(tmp_path, event, write, load):
    """Ask the plugin for a route, over a run "a" of four events and a run "b" of one."""
    write(tmp_path / "a", [replace(event, index=i) for i in range(4)])
    write(tmp_path / "b", [replace(event, ranks={"head": 1}, pruned=(), born=())])

    def get(route, **query):
        plugin = RankFlowPlugin(TBContext(data_provider=load(tmp_path)))
        return Client(plugin.get_plugin_apps()[route]).get(route, query_string=query)

    return get


def test_runs_are_told_with_their_numbers_of_events(ask):
    assert ask("/runs").json == {
        "runs": [{"name": "a", "events": 4}, {"name": "b", "events": 1}],
    }


@pytest.mark.parametrize("first", [0, 2, 4, 9])
def test_events_are_told_from_one_on(ask, event, first):
    view = view_run("a", [replace(event, index=i) for i in range(first, 4)])
    assert ask("/events", run="a", **{"from": first}).json == json.loads(encode(view))


def test_places_are_told_of_one_run_or_of_several_together(ask, event):
    for runs, sites in ((["a"], event.ranks), (["b", "a"], ["head", *event.ranks])):
        assert ask("/layout", run=runs).json == json.loads(encode(view_grid(sites)))


@pytest.mark.parametrize(
    ("route", "query", "status", "message"),
    [
        ("/events", {"run": "c"}, 404, "run 'c' has no events; there are a, b"),
        ("/events", {}, 404, "run '' has no events"),
        ("/events", {"run": "a", "from": "-1"}, 400, "a whole number from 0 on was expected"),
        ("/events", {"run": "a", "from": "x"}, 400, "from = 'x'"),
        ("/layout", {}, 400, "no run was named"),
        ("/layout", {"run": ["a", "c"]}, 404, "run 'c' has no events"),
    ],
)
def test_a_request_that_makes_no_sense_is_told_why(ask, route, query, status, message):
    answer = ask(route, **query)
    assert answer.status_code == status
    assert message in answer.json["error"]


def test_an_event_of_another_version_is_an_answer_and_not_a_crash(ask, tmp_path, event):
    summary = event_summary(replace(event, index=4))
    (value,) = summary.value
    value.tensor.string_val[0] = b'{"schema": 2}'
    writer = SummaryWriter(tmp_path / "a")
    writer._get_file_writer().add_summary(summary, 1)
    writer.close()
    answer = ask("/events", run="a")
    assert answer.status_code == 500
    assert "its schema is 2; this version reads 1" in answer.json["error"]


def test_the_script_is_served_as_the_tabs_module(ask):
    metadata = RankFlowPlugin(TBContext()).frontend_metadata()
    answer = ask(metadata.es_module_path)
    assert answer.text == view_script()
    assert answer.mimetype == "text/javascript"
    assert metadata.tab_name == "Rank flow"
