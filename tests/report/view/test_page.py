import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from rankflow.errors import RankFlowError
from rankflow.report.events import EventLog
from rankflow.report.view.data import view_run
from rankflow.report.view.page import render_page, report_runs


class Scripts(HTMLParser):
    """The attributes and the contents of every script of a page, and of its policy."""

    def __init__(self, page):
        super().__init__()
        self.scripts, self.policy, self.title = [], "", ""
        self._inside = ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self._inside = tag
        values = dict(attrs)
        if tag == "script":
            self.scripts.append((values, ""))
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"]

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        if self._inside == "script":
            values, before = self.scripts[-1]
            self.scripts[-1] = (values, before + data)
        if self._inside == "title":
            self.title += data


def write_run(folder, events):
    log = EventLog(folder / "events.jsonl")
    for event in events:
        log(event)
    return folder


def embedded(page):
    (_, data), _ = Scripts(page).scripts
    return json.loads(data)


def test_a_page_holds_its_runs_and_the_places_of_all_their_sites(event):
    other = replace(event, ranks={"layers.1.attn.query": 3}, pruned=(), born=())
    data = embedded(render_page([view_run("a", [event, event]), view_run("b", [other])]))
    assert [(run["name"], len(run["events"])) for run in data["runs"]] == [("a", 2), ("b", 1)]
    assert set(data["layout"]["cells"]) == {*event.ranks, "layers.1.attn.query"}


def test_names_that_look_like_markup_stay_data(event):
    nasty = "</script><script>alert(1)</script><!--"
    renamed = replace(event, ranks={nasty: 1}, pruned=(), born=())
    page = render_page([view_run(nasty, [renamed])])
    parsed = Scripts(page)
    assert len(parsed.scripts) == 2
    data = embedded(page)
    assert (data["runs"][0]["name"], data["runs"][0]["sites"]) == (nasty, [nasty])
    assert parsed.title == f"Rank flow of {nasty}"


def test_the_policy_lets_this_script_run_and_nothing_be_loaded(event):
    page = Scripts(render_page([view_run("a", [event])]))
    (attributes, script) = page.scripts[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert attributes == {"type": "module"}
    assert f"script-src 'sha256-{digest}'" in page.policy
    assert "default-src 'none'" in page.policy
    assert not re.search(r"connect-src|img-src|\*", page.policy)


def test_a_run_folder_becomes_a_page_named_after_it(tmp_path, event):
    run = write_run(tmp_path / "mine", [event])
    path = report_runs([run], tmp_path / "reports" / "mine.html")
    data = embedded(path.read_text(encoding="utf-8"))
    assert data["runs"][0]["name"] == "mine"
    assert data["runs"][0]["events"][0]["step"] == event.step
    assert [file.name for file in path.parent.iterdir()] == ["mine.html"]


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path, event):
    runs = [write_run(tmp_path / parent / "run", [event]) for parent in ("a", "b")]
    data = embedded(report_runs(runs, tmp_path / "out.html").read_text(encoding="utf-8"))
    assert [run["name"] for run in data["runs"]] == [str(run) for run in runs]


def test_a_report_that_fails_leaves_the_older_one(tmp_path, event):
    output = tmp_path / "out.html"
    output.write_text("older")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "events.jsonl").touch()
    for folder, message in (
        (tmp_path / "none", "holds no events.jsonl; name the folder of a run"),
        (tmp_path / "empty", "holds no event yet"),
    ):
        with pytest.raises(RankFlowError, match=message):
            report_runs([write_run(tmp_path / "a", [event]), folder], output)
    assert output.read_text() == "older"


def test_a_run_is_not_compared_with_itself(tmp_path, event):
    run = write_run(tmp_path / "run", [event])
    with pytest.raises(RankFlowError, match="is compared with itself"):
        report_runs([run, tmp_path / "." / "run"], tmp_path / "out.html")
