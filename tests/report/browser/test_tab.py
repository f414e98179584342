"""The tab "Rank flow" in TensorBoard, over real runs, in a real browser."""

import pytest

from rankflow.report.tensorboard import TensorBoardSink

pytestmark = pytest.mark.browser

ALL, LESS = "all/rankflow", "less/rankflow"
WIDE, NARROW = {"width": 1280, "height": 800}, {"width": 420, "height": 700}


@pytest.fixture(scope="session")
def address(runs, serve):
    return serve(runs[0].folder.parent)


@pytest.fixture
def tab(open_tab, address, runs):
    view, _ = open_tab(address)
    view.wait_for_events(len(runs[0].events))
    return view


def ranks_as_text(event):
    return {site: str(rank) for site, rank in event.ranks.items()}


def test_the_tab_opens_on_the_last_event_with_every_rank_in_its_cell(tab, runs):
    last = runs[0].events[-1]
    assert tab.texts() == ranks_as_text(last)
    assert tab.dotted() == {site for site, on in last.magnitudes.items() if on}
    assert tab.number(tab.field("limit")) == last.limit
    assert tab.number(tab.field("spent")) == last.spent


def test_the_slider_the_keys_and_the_play_button_move_over_events(tab, runs):
    events = runs[0].events
    for at in (0, 4, len(events) - 2):
        tab.move(at)
        assert tab.texts() == ranks_as_text(events[at])
        assert tab.number(tab.field("spent")) == events[at].spent
        told = tab.root.locator("output").first.inner_text().split()
        assert told == ["event", str(events[at].index), "·", "step", str(events[at].step)]
    tab.root.locator("body").press("Home")
    tab.root.locator("body").press("ArrowRight")
    assert tab.slider("at").input_value() == "1"
    tab.root.get_by_role("button", name="Play").click()
    tab.root.get_by_role("button", name="Pause").wait_for()
    tab.root.get_by_role("button", name="Play").wait_for(timeout=20_000)
    assert tab.slider("at").input_value() == str(len(events) - 1)


@pytest.mark.parametrize("at", [0, 3, 8])
def test_the_card_tells_what_the_log_tells_of_a_site(tab, runs, at):
    event = runs[0].events[at]
    tab.move(at)
    for site in list(event.ranks)[::4]:
        card = tab.hover(site)
        assert card["site"] == site
        assert tab.number(card["rank"]) == event.ranks[site]
        assert tab.number(card["importance"]) == pytest.approx(event.importance[site], rel=1e-3)
        assert tab.number(card["parameters"]) == event.parameters[site]
        assert card["trained"] == ("on" if event.magnitudes[site] else "off")
        if site in event.magnitude_change:
            change = event.magnitude_change[site]
            assert tab.number(card["magnitude"]) == pytest.approx(change, rel=1e-3)
        else:
            assert "magnitude" not in card


def test_the_card_lists_the_last_changes_of_a_site_with_their_reasons(tab, runs):
    events = runs[0].events
    moved = {c.site for event in events for c in (*event.pruned, *event.born)}
    assert len(moved) > 3
    for site in sorted(moved)[:4]:
        told = tab.hover(site)["changes"].split("\n")
        event = next(e for e in reversed(events) if any(c.site == site for c in e.pruned + e.born))
        assert f"step {event.step}" in told
        assert {c.reason for c in event.pruned + event.born if c.site == site} <= set(told)


@pytest.mark.parametrize(
    ("quantity", "column", "tolerance"),
    [
        ("importance", "importance", 0.06),
        ("parameters", "parameters", 0.06),
        ("magnitude", "magnitude_change", 0.06),
        ("rank", "ranks", 0),
    ],
)
def test_the_switch_shows_each_quantity(tab, runs, quantity, column, tolerance):
    event = runs[0].events[5]
    tab.move(5)
    tab.show(quantity)
    values = getattr(event, column)
    shown = {site: text for site, text in tab.texts().items() if text}
    assert shown.keys() == values.keys()
    untrained = len(values) < len(event.ranks)
    assert tab.root.get_by_text("no magnitude trained").is_visible() is untrained
    for site, text in shown.items():
        thousands = 1000 if text.endswith("k") else 1
        shown_value = thousands * tab.number(text.removesuffix("k"))
        assert shown_value == pytest.approx(values[site], rel=tolerance)


def test_two_events_are_compared(tab, runs):
    first, last = runs[0].events[2], runs[0].events[-1]
    tab.compare("fixed")
    tab.move(2, "against")
    shown = {site: tab.number(text) for site, text in tab.texts().items()}
    assert shown == {site: last.ranks[site] - rank for site, rank in first.ranks.items()}
    site = max(shown, key=lambda site: abs(shown[site]))
    card = tab.hover(site)
    assert [tab.number(card[name]) for name in ("rank", "rank-1", "rank-2")] == [
        last.ranks[site],
        first.ranks[site],
        shown[site],
    ]
    tab.compare("before")
    assert tab.slider("against").input_value() == str(len(runs[0].events) - 2)


def test_two_runs_are_compared_at_the_same_step_and_unshared_sites_say_so(tab, runs):
    both, less = runs
    tab.compare(f"run:{LESS}")
    tab.move(6)
    here = both.events[6]
    there = [event for event in less.events if event.step <= here.step][-1]
    for site, text in tab.texts().items():
        if site in there.ranks:
            assert tab.number(text) == here.ranks[site] - there.ranks[site]
        else:
            assert text == "A only"
    unshared = here.ranks.keys() - there.ranks.keys()
    assert {site for site, text in tab.texts().items() if text == "A only"} == unshared
    tab.choose("run", LESS)
    tab.compare(f"run:{ALL}")
    assert {site for site, text in tab.texts().items() if text == "B only"} == unshared


def test_the_sites_are_reached_by_keys(tab):
    sites = list(tab.texts())
    tab.cell(sites[0]).focus()
    assert tab.card()["site"] == sites[0]
    tab.cell(sites[0]).press("ArrowRight")
    assert tab.card()["site"] == sites[1]
    tab.cell(sites[1]).press("Escape")
    assert not tab.root.locator('[role="tooltip"]').is_visible()


def test_the_tab_follows_tensorboard_into_the_dark_and_has_a_switch_of_its_own(
    open_tab, address, runs, tmp_path
):
    view, page = open_tab(address, color_scheme="dark")
    view.wait_for_events(len(runs[0].events))
    assert view.ground() == "dark"
    dark = view.colours()
    page.screenshot(path=tmp_path / "dark.png")
    page.evaluate("document.body.classList.remove('dark-mode')")
    view.root.locator('[data-ground="light"]').wait_for()
    page.screenshot(path=tmp_path / "light.png")
    assert view.colours() != dark
    for ground in ("light", "dark"):
        view.root.get_by_role("button", name="Light or dark").click()
        assert view.ground() == ground
    assert view.colours() == dark
    assert (tmp_path / "dark.png").read_bytes() != (tmp_path / "light.png").read_bytes()


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
def test_no_card_is_cut_off(open_tab, address, runs, viewport):
    view, page = open_tab(address, viewport=viewport)
    view.wait_for_events(len(runs[0].events))
    frame = page.locator('iframe[src*="name=rankflow"]').bounding_box()
    for site in view.texts():
        view.hover(site)
        box = view.root.locator('[role="tooltip"]').bounding_box()
        assert box["x"] >= frame["x"]
        assert box["y"] >= frame["y"]
        assert box["x"] + box["width"] <= frame["x"] + frame["width"]
        assert box["y"] + box["height"] <= frame["y"] + frame["height"]


def test_new_events_are_followed_from_the_newest_and_leave_any_other_position(
    open_tab, runs, serve, tmp_path
):
    events = runs[0].events
    sink = TensorBoardSink(tmp_path / "logs" / "grows")
    for event in events[:4]:
        sink(event)
    view, _ = open_tab(serve(tmp_path / "logs"))
    view.wait_for_events(4)
    for event in events[4:6]:
        sink(event)
    view.wait_for_events(6)
    assert view.texts() == ranks_as_text(events[5])
    view.move(2)
    for event in events[6:8]:
        sink(event)
    sink.close()
    view.wait_for_events(8)
    assert view.texts() == ranks_as_text(events[2])
