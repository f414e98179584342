"""The report as a file in a real browser: the view of the tab, without a server."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from rankflow.records import RankEvent
from rankflow.report.view.data import view_run
from rankflow.report.view.page import render_page, report_runs

pytestmark = pytest.mark.browser

EXAMPLES = Path(__file__).parents[3] / "examples"
TYPES = [f"attn.{name}_proj" for name in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]


@pytest.fixture
def open_events(open_page, look, tmp_path):
    """Open a report over some events."""

    def open_report(events, **options):
        path = tmp_path / "report.html"
        path.write_text(render_page([view_run("run", events)]), encoding="utf-8")
        return look(open_page(path.as_uri(), **options))

    return open_report


def test_a_report_is_the_view_of_the_tab_and_asks_for_nothing(open_page, look, runs, tmp_path):
    path = report_runs([run.folder for run in runs], tmp_path / "report.html")
    page = open_page("about:blank")
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    view = look(page)
    for at in (0, len(runs[0].events) - 1):
        event = runs[0].events[at]
        view.move(at)
        assert {s: view.number(text) for s, text in view.texts().items() if text} == event.ranks
    view.compare("run:less")
    view.move(3)
    site = next(iter(runs[1].events[0].ranks))
    card = view.hover(site)
    difference = runs[0].events[3].ranks[site] - runs[1].events[3].ranks[site]
    assert view.number(card["rank-2"]) == difference
    page.screenshot(path=tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 10_000
    assert asked == [path.as_uri()]


def test_a_dark_browser_gets_a_dark_report(open_events, runs):
    assert open_events(runs[0].events, color_scheme="dark").ground() == "dark"
    assert open_events(runs[0].events, color_scheme="light").ground() == "light"


def test_what_an_old_log_does_not_tell_cannot_be_chosen_and_says_why(open_events, runs):
    old = [
        replace(event, parameters={}, magnitudes={}, magnitude_change={})
        for event in runs[0].events
    ]
    view = open_events(old)
    for quantity, reason in (("parameters", "do not tell parameters"), ("magnitude", "None of")):
        option = view.root.locator(f'label:has([value="{quantity}"])')
        assert option.locator("input").is_disabled()
        assert reason in option.get_attribute("title")
    assert view.root.locator('[value="importance"]').is_enabled()


def test_scores_that_are_no_numbers_stand_out(open_events, runs):
    event = runs[0].events[4]
    first, second, third = list(event.ranks)[:3]
    odd = {first: math.nan, second: math.inf, third: 0.0}
    view = open_events([replace(event, importance=event.importance | odd)])
    view.show("importance")
    texts, colours = view.texts(), view.colours()
    assert [texts[site] for site in odd] == ["NaN", "∞", "0"]
    assert colours[first] == colours[second] == "rgb(213, 94, 0)"
    assert colours[third] == "rgb(205, 205, 205)"
    assert view.hover(first)["importance"] == "NaN"


def test_200_000_cells_of_history_are_moved_over_without_delay(open_events):
    sites = [f"model.layers.{layer}.{name}" for layer in range(80) for name in TYPES]
    ranks = [{site: (i + e) % 17 for i, site in enumerate(sites)} for e in range(360)]
    floats = dict.fromkeys(sites, 0.5)
    events = [
        RankEvent(e, 10 * e, 9999, 9999, 9998, ranks[e], ranks[e], floats, (), (), 0.1)
        for e in range(360)
    ]
    view = open_events(events)
    assert view.texts() == {site: str(rank) for site, rank in ranks[-1].items()}
    moving = """slider => {
        const began = performance.now();
        for (let at = 0; at < 100; at++) {
            slider.value = at;
            slider.dispatchEvent(new Event("input"));
        }
        return (performance.now() - began) / 100;
    }"""
    assert view.slider("at").evaluate(moving) < 200  # milliseconds; it is about 15 on one core
    assert view.texts() == {site: str(rank) for site, rank in ranks[99].items()}
    view.compare("before")
    shown = {view.number(text) for text in view.texts().values()}
    assert shown == {1, -16}


def test_the_readmes_picture_is_drawn_from_a_run(runs, tmp_path):
    path = tmp_path / "picture.png"
    command = [sys.executable, str(EXAMPLES / "plugin_picture.py"), str(runs[0].folder), str(path)]
    subprocess.run(command, check=True)
    with Image.open(path) as image:
        assert image.size == (2400, 1400)
    assert path.stat().st_size < 300_000
