from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.allocation.policies import POLICIES, make_policy
from rankflow.allocation.scheduler import Scheduler
from rankflow.allocation.schedules import make_schedule
from rankflow.errors import BudgetError
from rankflow.records import ComponentTable, SiteInfo

FREE = [name for name in POLICIES if name != "frozen"]


def make_site(name="site", features=(5, 5), *, magnitude=False, bounds=(0, 8)):
    return SiteInfo(name, "linear", *features, magnitude, *bounds)


def make_table(sites, scores, *, ages=None, demand=None):
    """Build a table from one list of scores a site; components are old unless told otherwise."""
    flat = np.array([score for of_site in scores for score in of_site], dtype=float)
    return ComponentTable(
        sites=tuple(sites),
        ranks=np.array([len(of_site) for of_site in scores], dtype=np.int64),
        scores=flat,
        ages=np.full(len(flat), 9) if ages is None else np.array(ages, dtype=np.int64),
        demand=np.zeros(len(sites)) if demand is None else np.array(demand, dtype=float),
    )


def make_scheduler(
    policy="knapsack", *, limit=100, total=100, warmup=0, cooldown=20, every=10, **changes
):
    """Build a scheduler of a constant budget that recycles nothing unless told otherwise."""
    settings = {"recycle": 0.0, "hysteresis": 0.0, "protect": 2} | changes
    return Scheduler(
        policy=make_policy(policy) if isinstance(policy, str) else policy,
        budget_at=lambda step: limit,
        total_steps=total,
        warmup_steps=warmup,
        cooldown_steps=cooldown,
        every=every,
        **settings,
    )


def kept(plan):
    return [keep.tolist() for keep in plan.keep]


def moved_cost(table, plan):
    return int(table.component_costs @ plan.births)


def test_events_come_at_regular_steps_from_the_warm_up_to_the_cool_down():
    scheduler = make_scheduler(total=100, warmup=20, cooldown=30, every=10)
    assert scheduler.event_steps() == [20, 30, 40, 50, 60, 70]


def test_without_a_warm_up_the_first_event_comes_after_one_interval():
    assert make_scheduler(total=30, cooldown=0, every=10).event_steps() == [10, 20, 30]


def test_the_last_event_falls_on_the_cool_down_even_off_the_interval():
    assert make_scheduler(total=100, warmup=7, cooldown=25, every=30).event_steps() == [
        7,
        37,
        67,
        75,
    ]


def test_an_interval_longer_than_the_window_leaves_its_two_ends():
    assert make_scheduler(total=50, warmup=10, cooldown=10, every=90).event_steps() == [10, 40]


def test_no_event_happens_before_the_first_step_or_in_the_cool_down():
    scheduler = make_scheduler(total=50, cooldown=10, every=1)
    assert [scheduler.is_due(step) for step in (0, 41, 50)] == [False, False, False]


@given(st.integers(1, 60), st.data())
def test_events_ascend_end_at_the_cool_down_and_keep_the_interval(total, data):
    warmup = data.draw(st.integers(0, total - 1))
    cooldown = data.draw(st.integers(0, total - 1 - warmup))
    every = data.draw(st.integers(1, total + 5))
    steps = make_scheduler(total=total, warmup=warmup, cooldown=cooldown, every=every).event_steps()
    assert steps[-1] == total - cooldown
    assert steps[0] >= max(warmup, 1)
    gaps = np.diff(steps)
    assert (gaps[:-1] == every).all()
    assert (gaps <= every).all()
    assert (gaps > 0).all()


@st.composite
def tables(draw):
    """A table with dead, young, worthless and saturated sites, all within their bounds."""
    sites, scores, ages, demand = [], [], [], []
    for i in range(draw(st.integers(1, 6))):
        lowest = draw(st.integers(0, 2))
        highest = draw(st.integers(lowest, 6))
        features = draw(st.sampled_from([(8, 8), (8, 32), (32, 8), (3, 50)]))
        magnitude = draw(st.booleans())
        rank = draw(st.integers(lowest, highest))
        sites.append(make_site(f"s{i}", features, magnitude=magnitude, bounds=(lowest, highest)))
        score = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1000))
        scores.append(draw(st.lists(score, min_size=rank, max_size=rank)))
        ages += draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank))
        demand.append(draw(score))
    return make_table(sites, scores, ages=ages, demand=demand)


@pytest.mark.parametrize("policy", FREE)
@given(table=tables(), data=st.data())
@settings(max_examples=40)
def test_every_plan_is_within_the_budget_and_the_bounds(policy, table, data):
    limit = data.draw(
        st.integers(table.cost_of(table.min_ranks), table.cost_of(table.max_ranks) + 50)
    )
    scheduler = make_scheduler(
        policy,
        limit=limit,
        recycle=data.draw(st.floats(0, 1)),
        hysteresis=data.draw(st.floats(0, 2)),
    )
    step = data.draw(st.sampled_from([0, 10, 50, 80, 100]))
    plan = scheduler.plan(table, step)
    assert table.cost_of(plan.ranks) <= limit
    assert (plan.ranks >= table.min_ranks).all()
    assert (plan.ranks <= table.max_ranks).all()
    again = scheduler.plan(table, step)
    assert kept(again) == kept(plan)
    assert again.births.tolist() == plan.births.tolist()


@pytest.mark.parametrize("policy", FREE)
@given(table=tables(), recycle=st.floats(0, 1), step=st.integers(0, 100))
@settings(max_examples=40)
def test_at_a_full_budget_newborns_take_at_most_the_share_that_may_move(
    policy, table, recycle, step
):
    limit = max(table.cost_of(table.ranks), 1)
    scheduler = make_scheduler(policy, limit=limit, recycle=recycle)
    share = recycle * max(80 - step, 0) / 80
    assert moved_cost(table, scheduler.plan(table, step)) <= share * limit


@pytest.mark.parametrize("policy", FREE)
@given(table=tables(), step=st.sampled_from([10, 80]))
@settings(max_examples=40)
def test_without_recycling_nothing_is_born_into_a_full_budget(policy, table, step):
    scheduler = make_scheduler(policy, limit=table.cost_of(table.ranks))
    assert not scheduler.plan(table, step).births.any()


def test_recycling_decays_linearly_to_nothing_at_the_cool_down():
    sites = [make_site("poor", bounds=(0, 100)), make_site("rich", bounds=(0, 100))]
    table = make_table(sites, [[0.0] * 20, [9.0] * 80], demand=[0.0, 9.0])  # 10 parameters each
    scheduler = make_scheduler(limit=1000, recycle=0.2)
    births = [int(scheduler.plan(table, step).births.sum()) for step in (0, 20, 40, 60, 80)]
    assert births == [20, 15, 10, 5, 0]


def test_recycling_waits_at_its_full_share_until_the_warm_up_ends():
    sites = [make_site("poor", bounds=(0, 100)), make_site("rich", bounds=(0, 100))]
    table = make_table(sites, [[0.0] * 20, [9.0] * 80], demand=[0.0, 9.0])
    scheduler = make_scheduler(limit=1000, recycle=0.2, warmup=40)
    births = [int(scheduler.plan(table, step).births.sum()) for step in (40, 60, 80)]
    assert births == [20, 10, 0]


@pytest.mark.parametrize(("score", "displaced"), [(1.9, True), (2.0, False), (2.1, False)])
def test_a_newborn_displaces_only_what_earns_less_than_its_discounted_promise(score, displaced):
    sites = [make_site("poor"), make_site("rich")]
    table = make_table(sites, [[score], [9.0]], demand=[0.0, 4.0])
    plan = make_scheduler(limit=20, recycle=1.0, hysteresis=1.0).plan(table, 10)
    assert plan.ranks.tolist() == ([0, 2] if displaced else [1, 1])


def test_worth_is_compared_for_each_parameter():
    cheap, dear = make_site("cheap", (5, 5)), make_site("dear", (5, 15))
    table = make_table([cheap, dear], [[1.0] * 4, [9.0, 1.5]], demand=[0.9, 0.0])
    plan = make_scheduler(limit=80, recycle=1.0).plan(table, 10)
    # 1.5 for 20 parameters is less than two times 0.9 for 10, though it is the greater score.
    assert kept(plan) == [[0, 1, 2, 3], [0]]
    assert plan.births.tolist() == [2, 0]


def test_a_protected_newborn_survives_better_components():
    sites = [make_site("old"), make_site("new")]
    table = make_table(sites, [[5.0, 4.0], [0.0, 3.0]], ages=[9, 9, 1, 9])
    plan = make_scheduler(limit=20, protect=2).plan(table, 10)
    assert kept(plan) == [[0], [0]]


def test_a_newborn_is_judged_once_its_protection_ends():
    sites = [make_site("old"), make_site("new")]
    table = make_table(sites, [[5.0, 4.0], [0.0, 3.0]], ages=[9, 9, 2, 9])
    plan = make_scheduler(limit=20, protect=2).plan(table, 10)
    assert kept(plan) == [[0, 1], []]


def test_protection_gives_way_where_the_budget_cannot_hold_all_newborns():
    sites = [make_site("a"), make_site("b")]
    table = make_table(sites, [[1.0, 3.0], [2.0]], ages=[0, 0, 0])
    plan = make_scheduler(limit=20).plan(table, 10)
    assert kept(plan) == [[1], [0]]


def test_protection_counts_the_magnitudes_as_spent():
    sites = [make_site("a", magnitude=True), make_site("b", magnitude=True)]
    table = make_table(sites, [[0.0], [2.0]], ages=[0, 9])
    assert kept(make_scheduler(limit=20).plan(table, 10)) == [[0], []]


def test_a_protected_newborn_survives_the_best_old_component_of_its_site():
    table = make_table([make_site()], [[5.0, 4.0, 0.0]], ages=[9, 9, 0])
    assert kept(make_scheduler(limit=10).plan(table, 10)) == [[2]]
    assert kept(make_scheduler(limit=20).plan(table, 10)) == [[0, 2]]


@given(tables(), st.data())
def test_all_young_components_survive_whenever_the_budget_can_hold_them(table, data):
    young = table.ages < 2
    needed = np.maximum(
        table.min_ranks,
        np.bincount(table.site_index[young], minlength=len(table.sites)),
    )
    limit = table.cost_of(needed) + data.draw(st.integers(0, 60))
    plan = make_scheduler(limit=limit, protect=2).plan(table, 10)
    ages = np.split(table.ages, np.cumsum(table.ranks)[:-1])
    for keep, of_site in zip(plan.keep, ages, strict=True):
        assert set(np.flatnonzero(of_site < 2)) <= set(keep)


def test_a_free_budget_is_grown_into_without_recycling():
    sites = [make_site("a"), make_site("b")]
    table = make_table(sites, [[2.0], [1.0]], demand=[2.0, 1.0])
    plan = make_scheduler(limit=50).plan(table, 10)
    assert kept(plan) == [[0], [0]]
    assert plan.births.tolist() == [1, 1]


def test_growth_prefers_the_site_that_promises_most_for_a_parameter():
    sites = [make_site("dear", (5, 25)), make_site("cheap", (5, 5))]
    table = make_table(sites, [[4.0], [3.0]], demand=[4.0, 3.0])
    plan = make_scheduler(limit=70).plan(table, 10)  # 30 are free: for one, or for the other
    assert plan.births.tolist() == [0, 1]


def test_a_growing_budget_is_filled_over_the_events_of_a_run():
    sites = [make_site(f"s{i}", bounds=(0, 5)) for i in range(4)]
    budget_at = make_schedule("linear", start=40, target=160, total_steps=100, cooldown_steps=20)
    scheduler = replace(make_scheduler(protect=0), budget_at=budget_at)
    ranks = np.ones(4, dtype=np.int64)
    for step in scheduler.event_steps():
        table = make_table(sites, [[1.0] * rank for rank in ranks], demand=[1.0] * 4)
        ranks = scheduler.plan(table, step).ranks
        assert table.cost_of(ranks) <= budget_at(step)
    assert ranks.sum() == 16


def test_a_saturated_site_stops_growing():
    sites = [make_site("full", bounds=(0, 2)), make_site("worthless"), make_site("open")]
    table = make_table(sites, [[9.0, 9.0], [0.0], [1.0]], demand=[9.0, 0.0, 1.0])
    plan = make_scheduler(limit=200).plan(table, 10)
    assert plan.births.tolist() == [0, 0, 1]


def test_a_dead_site_returns_when_its_remembered_worth_pays():
    table = make_table([make_site("dead"), make_site("alive")], [[], [1.0]], demand=[3.0, 1.0])
    plan = make_scheduler(limit=10, recycle=1.0).plan(table, 0)
    assert plan.ranks.tolist() == [1, 0]


def test_a_dead_site_stays_dead_while_nothing_may_move():
    table = make_table([make_site("dead"), make_site("alive")], [[], [1.0]], demand=[3.0, 1.0])
    assert make_scheduler(limit=10).plan(table, 10).ranks.tolist() == [0, 1]


def test_uniform_follows_a_falling_budget_evenly():
    sites = [make_site(f"s{i}") for i in range(4)]
    table = make_table(sites, [[1.0] * 6] * 4)
    assert make_scheduler("uniform", limit=120).plan(table, 10).ranks.tolist() == [3, 3, 3, 3]


def test_random_ignores_the_scores_at_every_event():
    sites = [make_site(f"s{i}") for i in range(4)]
    scheduler = make_scheduler("random", limit=120)
    rising = make_table(sites, [[1.0] * 8, [2.0] * 8, [3.0] * 8, [4.0] * 8], demand=[1.0] * 4)
    falling = make_table(sites, [[4.0] * 8, [3.0] * 8, [2.0] * 8, [1.0] * 8], demand=[2.0] * 4)
    assert scheduler.plan(rising, 10).ranks.tolist() == scheduler.plan(falling, 10).ranks.tolist()
    assert len(set(scheduler.plan(rising, 10).ranks.tolist())) > 1


def test_frozen_keeps_its_pattern_whatever_the_sites_promise():
    sites = [make_site("a"), make_site("b")]
    policy = make_policy("frozen", pattern=np.array([2, 1]))
    table = make_table(sites, [[0.0, 0.0], [9.0]], demand=[0.0, 9.0])
    plan = make_scheduler(policy, limit=30, recycle=1.0).plan(table, 10)
    assert kept(plan) == [[0, 1], [0]]
    assert not plan.births.any()


def test_proportional_moves_ranks_towards_the_scores_by_its_share_only():
    sites = [make_site("poor"), make_site("rich")]
    table = make_table(sites, [[1.0] * 5, [9.0] * 5])  # 10 parameters each, 100 in all
    scheduler = make_scheduler("proportional", limit=100, recycle=0.25)
    assert scheduler.plan(table, 0).ranks.tolist() == [3, 7]
    assert scheduler.plan(table, 80).ranks.tolist() == [5, 5]


def test_what_a_cut_birth_leaves_free_goes_back_to_the_best_components():
    sites = [make_site("poor"), make_site("rich"), make_site("middling")]
    table = make_table(sites, [[1.0, 2.0], [30.0], [4.0, 3.0]])
    plan = make_scheduler("proportional", limit=50).plan(table, 10)
    assert plan.ranks.tolist() == [2, 1, 2]


def test_a_tie_spares_the_earlier_component_and_the_earlier_site():
    sites = [make_site("a"), make_site("b")]
    table = make_table(sites, [[1.0, 1.0], [1.0, 1.0]])
    assert kept(make_scheduler("threshold", limit=30).plan(table, 10)) == [[0, 1], [0]]
    assert kept(make_scheduler("knapsack", limit=30).plan(table, 10)) == [[0, 1], [0]]


def test_an_equal_promise_never_displaces_a_living_component():
    sites = [make_site("a"), make_site("b")]
    table = make_table(sites, [[1.0, 1.0], [1.0, 1.0]], demand=[1.0, 1.0])
    for policy in ("threshold", "knapsack", "knapsack-exact"):
        plan = make_scheduler(policy, limit=40, recycle=1.0).plan(table, 10)
        assert kept(plan) == [[0, 1], [0, 1]]
        assert not plan.births.any()


def test_a_budget_below_the_minimum_ranks_is_refused():
    table = make_table([make_site(bounds=(1, 4))], [[1.0]])
    with pytest.raises(BudgetError, match="less than the 10 that the minimum ranks"):
        make_scheduler(limit=9).plan(table, 10)
