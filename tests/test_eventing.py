from dataclasses import replace

import numpy as np

from rankflow.eventing import describe
from rankflow.records import (
    ComponentChange,
    ComponentTable,
    MagnitudeTable,
    RankPlan,
    SiteInfo,
)

SITES = tuple(SiteInfo(name, "linear", 4, 6, True, 0, 4) for name in ("q", "k", "v"))


def make_table():
    return ComponentTable(
        sites=SITES,
        ranks=np.array([3, 0, 2]),
        scores=np.array([1.0, 0.5, 2.0, 4.0, 8.0]),
        ages=np.zeros(5, dtype=np.int64),
        demand=np.array([0.0, 3.0, 1.5]),
    )


def make_plan():
    """Prune components 0 and 1 of q, wake k up, and let v grow by one."""
    return RankPlan(
        keep=(np.array([2]), np.array([], dtype=np.int64), np.array([0, 1])),
        births=np.array([0, 1, 1]),
    )


def test_an_event_counts_parameters_before_and_after():
    event = describe(make_table(), make_plan(), 4, 120, 70, 0.25)
    assert (event.index, event.step, event.limit, event.seconds) == (4, 120, 70, 0.25)
    assert event.spent_before == 3 * 6 + 5 * 10
    assert event.spent == 3 * 6 + 5 * 10
    assert event.ranks_before == {"q": 3, "k": 0, "v": 2}
    assert event.ranks == {"q": 1, "k": 1, "v": 3}


def test_importance_is_the_total_score_of_a_site_before_the_event():
    event = describe(make_table(), make_plan(), 0, 1, 70, 0.0)
    assert event.importance == {"q": 3.5, "k": 0.0, "v": 12.0}


def test_the_pruned_are_named_by_their_place_before_the_event():
    event = describe(make_table(), make_plan(), 0, 1, 70, 0.0)
    reason = "another site promises more"
    assert event.pruned == (
        ComponentChange("q", 0, 1.0, reason),
        ComponentChange("q", 1, 0.5, reason),
    )


def test_the_born_are_named_by_their_place_after_the_event_with_the_demand_behind_them():
    event = describe(make_table(), make_plan(), 0, 1, 70, 0.0)
    assert event.born == (
        ComponentChange("k", 0, 3.0, "demand per parameter"),
        ComponentChange("v", 2, 1.5, "demand per parameter"),
    )


def test_the_reason_is_the_budget_where_the_model_was_above_it():
    plan = RankPlan(
        keep=(np.array([2]), np.array([], dtype=np.int64), np.array([1])), births=np.zeros(3, int)
    )
    event = describe(make_table(), plan, 0, 1, 67, 0.0)
    assert {change.reason for change in event.pruned} == {"the budget fell"}
    assert [change.component for change in event.pruned] == [0, 1, 0]


def test_an_event_that_changes_nothing_says_so():
    table = make_table()
    plan = RankPlan(
        keep=(np.arange(3), np.arange(0), np.arange(2)), births=np.zeros(3, dtype=np.int64)
    )
    event = describe(table, plan, 0, 1, 100, 0.0)
    assert event.ranks == event.ranks_before
    assert event.pruned == event.born == ()


def test_the_record_holds_plain_values_only():
    event = describe(make_table(), make_plan(), 0, 1, 70, 0.0)
    values = [
        event.spent,
        event.spent_before,
        *event.ranks.values(),
        *event.ranks_before.values(),
        *(change.component for change in event.pruned + event.born),
    ]
    assert {type(value) for value in values} == {int}
    scores = [*event.importance.values(), *(change.score for change in event.pruned + event.born)]
    assert {type(score) for score in scores} == {float}


def covered_table():
    """The same components; q and k have a budgeted magnitude, and v none."""
    sites = tuple(
        replace(site, has_magnitude=site.name != "v", is_budgeted=site.name != "v")
        for site in SITES
    )
    magnitudes = MagnitudeTable(
        np.array([True, False, False]), np.array([0.25, 0.75, 0.0]), np.zeros(3, dtype=np.int64)
    )
    return replace(make_table(), sites=sites, magnitudes=magnitudes)


def test_magnitudes_that_come_and_go_are_told_and_counted():
    plan = replace(make_plan(), magnitudes=np.array([False, True, False]))
    event = describe(covered_table(), plan, 0, 1, 67, 0.0)
    assert event.spent_before == 6 + 5 * 10
    assert event.spent == 6 + 5 * 10
    assert event.magnitudes == {"q": False, "k": True, "v": False}
    assert {type(value) for value in event.magnitudes.values()} == {bool}
    assert event.pruned[-1] == ComponentChange("q", None, 0.25, "another site promises more")
    assert event.born[-1] == ComponentChange("k", None, 0.75, "demand per parameter")
    assert [c.component for c in event.pruned + event.born].count(None) == 2


def test_a_magnitude_above_the_budget_goes_because_the_budget_fell():
    plan = replace(make_plan(), magnitudes=np.array([False, False, False]))
    event = describe(covered_table(), plan, 0, 1, 55, 0.0)
    assert (event.spent_before, event.spent) == (56, 50)
    assert event.pruned[-1].reason == "the budget fell"


def test_without_budgeted_magnitudes_an_event_says_nothing_of_them():
    assert describe(make_table(), make_plan(), 4, 120, 70, 0.25).magnitudes == {}


def test_the_parameters_of_a_site_are_those_after_the_event():
    plan = replace(make_plan(), magnitudes=np.array([False, True, False]))
    event = describe(covered_table(), plan, 0, 1, 67, 0.0)
    assert event.parameters == {"q": 10, "k": 6 + 10, "v": 3 * 10}
    assert sum(event.parameters.values()) == event.spent


def test_the_change_of_magnitudes_is_told_of_the_sites_that_trained_one_before_the_event():
    plan = replace(make_plan(), magnitudes=np.array([False, True, False]))
    changes = np.array([0.5, 0.0, 0.0])
    covered = replace(covered_table(), magnitude_change=changes)
    assert describe(covered, plan, 0, 1, 67, 0.0).magnitude_change == {"q": 0.5}
    always = replace(make_table(), magnitude_change=changes)
    told = describe(always, make_plan(), 0, 1, 70, 0.0).magnitude_change
    assert told == {"q": 0.5, "k": 0.0, "v": 0.0}
