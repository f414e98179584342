from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.allocation.policies import (
    POLICIES,
    allocate_knapsack,
    knapsack,
    knapsack_exact,
    make_policy,
    plan_from_ranks,
    threshold,
)
from rankflow.allocation.pools import magnitudes_at, pool_magnitudes, unpool_plan, with_pools
from rankflow.allocation.scheduler import Scheduler
from rankflow.records import ComponentTable, MagnitudeTable, SiteInfo

FREE = [name for name in POLICIES if name != "frozen"]


def make_site(name, features, *, magnitude="budgeted", bounds=(0, 8)):
    """Build a site whose magnitude is budgeted, always there, or absent."""
    has = magnitude != "absent"
    return SiteInfo(name, "linear", *features, has, *bounds, magnitude == "budgeted")


def make_table(sites, scores, magnitudes, *, on=None, ages=9, magnitude_ages=9, demand=0.0):
    """Build a table from the scores of components and of magnitudes, all old by default."""
    flat = np.array([score for of_site in scores for score in of_site], dtype=float)
    count = len(sites)
    on = [site.is_budgeted for site in sites] if on is None else on
    return ComponentTable(
        sites=tuple(sites),
        ranks=np.array([len(of_site) for of_site in scores], dtype=np.int64),
        scores=flat,
        ages=np.full(len(flat), ages),
        demand=np.broadcast_to(np.array(demand, dtype=float), count).copy(),
        magnitudes=MagnitudeTable(
            np.array(on, dtype=np.bool_),
            np.array(magnitudes, dtype=float),
            np.broadcast_to(np.array(magnitude_ages, dtype=np.int64), count).copy(),
        ),
    )


def small_table(seed, *, off=()):
    """Three sites of three prices: two with a budgeted magnitude, one that always has its own."""
    random = np.random.default_rng(seed)
    sites = [
        make_site("a", (3, 5)),
        make_site("b", (7, 4), bounds=(1, 2)),
        make_site("c", (2, 3), magnitude="always"),
        make_site("d", (5, 2)),
    ]
    scores = [random.exponential(size=n).tolist() for n in (3, 2, 2, 1)]
    on = [site.is_budgeted and site.name not in off for site in sites]
    return make_table(sites, scores, random.exponential(size=4), on=on)


def cost_by_hand(table, ranks, on):
    """Count what components, fixed magnitudes and those that are on cost, site by site."""
    total = 0
    for site, rank, is_on in zip(table.sites, ranks, on, strict=True):
        total += rank * (site.in_features + site.out_features)
        total += site.out_features * bool(is_on if site.is_budgeted else site.has_magnitude)
    return total


def worth(table, ranks, on):
    """Total score of the best components up to these ranks, and of the magnitudes that are on."""
    scores = np.split(table.scores, np.cumsum(table.ranks)[:-1])
    kept = sum(np.sort(s)[::-1][:r].sum() for s, r in zip(scores, ranks, strict=True))
    budgeted = [site.is_budgeted for site in table.sites]
    return kept + float(table.magnitudes.scores @ (np.array(on) & budgeted))


def best_by_enumeration(table, limit):
    """The greatest worth over all ranks and all ways to have magnitudes on or off."""
    ranks = [
        range(site.min_rank, min(site.max_rank, live) + 1)
        for site, live in zip(table.sites, table.ranks, strict=True)
    ]
    switches = [(False, True) if on else (False,) for on in table.magnitudes.on]
    choices = product(product(*ranks), product(*switches))
    return max(worth(table, r, on) for r, on in choices if cost_by_hand(table, r, on) <= limit)


def decide(policy, table, limit):
    """Let a policy decide ranks and magnitudes of a table."""
    pooled = pool_magnitudes(table)
    return unpool_plan(plan_from_ranks(pooled, policy(pooled, limit)), table)


LIMITS = [15, 22, 31, 38, 44, 57, 100]


# --- policies against brute force


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_the_exact_knapsack_finds_the_best_ranks_and_magnitudes(seed, limit):
    table = small_table(seed)
    plan = decide(knapsack_exact, table, limit)
    assert cost_by_hand(table, plan.ranks, plan.magnitudes) <= limit
    assert not plan.births.any()
    best = best_by_enumeration(table, limit)
    assert worth(table, plan.ranks, plan.magnitudes) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_the_greedy_knapsack_is_within_its_bound_of_the_best(seed, limit):
    table = small_table(seed)
    plan = decide(knapsack, table, limit)
    bound = allocate_knapsack(pool_magnitudes(table), limit).upper_bound
    assert cost_by_hand(table, plan.ranks, plan.magnitudes) <= limit
    best = best_by_enumeration(table, limit)
    assert worth(table, plan.ranks, plan.magnitudes) <= best * (1 + 1e-12)
    assert best <= bound * (1 + 1e-12)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("seed", range(6))
def test_the_threshold_takes_components_and_magnitudes_by_score_alone(seed, limit):
    table = small_table(seed)
    ranks = [site.min_rank for site in table.sites]
    on = [False] * len(ranks)
    offers = []
    for s, (site, scores) in enumerate(
        zip(table.sites, np.split(table.scores, np.cumsum(table.ranks)[:-1]), strict=True)
    ):
        offers += [(score, s, False) for score in np.sort(scores)[::-1][site.min_rank : 8]]
        if site.is_budgeted:
            offers.append((table.magnitudes.scores[s], s, True))
    for _, s, is_magnitude in sorted(offers, reverse=True):
        trial_ranks, trial_on = list(ranks), list(on)
        if is_magnitude:
            trial_on[s] = True
        else:
            trial_ranks[s] += 1
        if cost_by_hand(table, trial_ranks, trial_on) > limit:
            break
        ranks, on = trial_ranks, trial_on
    plan = decide(threshold, table, limit)
    assert plan.ranks.tolist() == ranks
    assert [
        bool(m) for m, s in zip(plan.magnitudes, table.sites, strict=True) if s.is_budgeted
    ] == [m for m, s in zip(on, table.sites, strict=True) if s.is_budgeted]


def test_a_magnitude_is_weighed_by_what_it_costs():
    """Of equal scores the cheaper one stays: a magnitude costs 4, a component 10."""
    table = make_table([make_site("a", (6, 4))], [[1.0]], [0.9])
    plan = decide(knapsack, table, 10)
    assert (plan.ranks.tolist(), plan.magnitudes.tolist()) == ([1], [False])
    plan = decide(knapsack, table, 9)
    assert (plan.ranks.tolist(), plan.magnitudes.tolist()) == ([0], [True])


# --- pool and unpool


@st.composite
def tables(draw):
    """Draw tables of up to five sites in any state of magnitudes."""
    sites, scores, on = [], [], []
    for i in range(draw(st.integers(1, 5))):
        features = draw(st.tuples(st.integers(1, 9), st.integers(1, 9)))
        magnitude = draw(st.sampled_from(["budgeted", "always", "absent"]))
        low = draw(st.integers(0, 1))
        sites.append(make_site(f"s{i}", features, magnitude=magnitude, bounds=(low, 4)))
        scores.append(draw(st.lists(st.floats(0, 10), min_size=low, max_size=4)))
        on.append(magnitude == "budgeted" and draw(st.booleans()))
    count = len(sites)
    floats = st.lists(st.floats(0, 10), min_size=count, max_size=count)
    ages = st.lists(st.integers(0, 3), min_size=count, max_size=count)
    return make_table(
        sites,
        scores,
        draw(floats),
        on=on,
        ages=draw(st.integers(0, 3)),
        magnitude_ages=draw(ages),
        demand=draw(floats),
    )


@given(tables())
def test_a_pooled_table_costs_the_same_and_holds_the_same_scores(table):
    pooled = pool_magnitudes(table)
    on = table.magnitudes.on
    assert pooled.cost_of(pooled.ranks) == table.cost_of(table.ranks, on)
    assert pooled.cost_of(pooled.ranks) == cost_by_hand(table, table.ranks, on)
    assert pooled.sites[: len(table.sites)] == table.sites
    names = [site.name for site in table.sites if site.is_budgeted]
    assert [s.name for s in pooled.sites[len(table.sites) :]] == [f"{n}.magnitude" for n in names]
    behind = len(table.scores)
    assert pooled.scores[:behind].tolist() == table.scores.tolist()
    assert pooled.scores[behind:].tolist() == table.magnitudes.scores[on].tolist()
    assert pooled.ages[behind:].tolist() == table.magnitudes.ages[on].tolist()
    assert len(pooled.scores) == pooled.ranks.sum() == len(pooled.ages)


@given(tables())
def test_keeping_everything_survives_the_way_into_pools_and_back(table):
    pooled = pool_magnitudes(table)
    plan = unpool_plan(plan_from_ranks(pooled, pooled.ranks), table)
    assert plan.ranks.tolist() == table.ranks.tolist()
    assert [keep.tolist() for keep in plan.keep] == [list(range(rank)) for rank in table.ranks]
    expected = [
        bool(on) if site.is_budgeted else site.has_magnitude
        for site, on in zip(table.sites, table.magnitudes.on, strict=True)
    ]
    assert plan.magnitudes.tolist() == expected


def test_a_table_without_budgeted_magnitudes_is_left_alone():
    site = make_site("a", (3, 5), magnitude="always")
    table = ComponentTable(
        (site,), np.array([1]), np.ones(1), np.zeros(1, dtype=np.int64), np.zeros(1)
    )
    assert pool_magnitudes(table) is table
    plan = plan_from_ranks(table, table.ranks)
    assert unpool_plan(plan, table) is plan
    assert plan.magnitudes is None


def test_sites_whose_magnitudes_are_not_budgeted_have_no_pool():
    sites = [make_site(kind, (3, 5), magnitude=kind) for kind in ("always", "budgeted", "absent")]
    assert [site.name for site in with_pools(sites)] == [
        "always",
        "budgeted",
        "absent",
        "budgeted.magnitude",
    ]
    assert magnitudes_at(np.array([1, 1, 1, 0]), sites).tolist() == [True, False, False]
    assert magnitudes_at(np.array([0, 0, 0, 1]), sites).tolist() == [True, True, False]


# --- events


def make_scheduler(policy="knapsack", *, limit=100, **changes):
    settings = {"recycle": 0.0, "hysteresis": 0.0, "protect": 1} | changes
    return Scheduler(
        policy=make_policy(policy) if isinstance(policy, str) else policy,
        budget_at=lambda step: limit,
        total_steps=100,
        warmup_steps=0,
        cooldown_steps=20,
        every=10,
        **settings,
    )


@settings(max_examples=60)
@given(
    tables(),
    st.sampled_from(FREE),
    st.integers(0, 120),
    st.integers(0, 80),
    st.floats(0, 1),
    st.integers(0, 2),
)
def test_no_policy_ever_plans_above_the_limit(table, policy, extra, step, recycle, protect):
    lowest = cost_by_hand(table, table.min_ranks, [False] * len(table.sites))
    limit = lowest + extra
    scheduler = make_scheduler(policy, limit=limit, recycle=recycle, protect=protect)
    plan = scheduler.plan(table, step)
    assert cost_by_hand(table, plan.ranks, plan.magnitudes) <= limit
    assert len(plan.keep) == len(plan.births) == len(plan.magnitudes) == len(table.sites)
    for site, on in zip(table.sites, plan.magnitudes, strict=True):
        assert site.is_budgeted or bool(on) is site.has_magnitude
    assert plan.ranks.tolist() == scheduler.plan(table, step).ranks.tolist()


@pytest.mark.parametrize(("age", "stays"), [(0, True), (1, False)])
def test_a_young_magnitude_is_protected(age, stays):
    """It is worth the least, and one of a magnitude of 5 and a component of 8 has to go."""
    table = make_table([make_site("a", (3, 5))], [[1.0, 2.0]], [0.0], magnitude_ages=age)
    plan = make_scheduler(limit=16, protect=1).plan(table, 10)
    assert plan.magnitudes.tolist() == [stays]
    assert plan.ranks.tolist() == [1 if stays else 2]


def test_protection_yields_where_the_budget_leaves_no_choice():
    table = make_table([make_site("a", (3, 5))], [[1.0]], [0.5], ages=0, magnitude_ages=0)
    plan = make_scheduler(limit=8, protect=9).plan(table, 10)
    assert (plan.ranks.tolist(), plan.magnitudes.tolist()) == ([1], [False])


@pytest.mark.parametrize(("promise", "comes_back"), [(1.99, False), (2.0, False), (2.01, True)])
def test_a_magnitude_comes_back_when_its_promise_beats_the_rest_by_the_hysteresis(
    promise, comes_back
):
    """It would displace a component of equal price and score 1, and must promise twice that."""
    sites = [make_site("a", (3, 6)), make_site("b", (2, 4), magnitude="absent")]
    table = make_table(sites, [[9.0], [1.0]], [promise, 0.0], on=[False, False])
    limit = cost_by_hand(table, [1, 1], [False, False])
    plan = make_scheduler(limit=limit, hysteresis=1.0, recycle=1.0).plan(table, 10)
    assert plan.magnitudes.tolist() == [comes_back, False]
    assert plan.ranks.tolist() == [1, 0 if comes_back else 1]


def test_a_magnitude_that_promises_nothing_stays_off_even_where_there_is_room():
    table = make_table([make_site("a", (3, 6))], [[9.0]], [0.0], on=[False])
    assert not make_scheduler(limit=100).plan(table, 10).magnitudes[0]


def test_a_magnitude_comes_back_into_free_room_without_displacing_anything():
    table = make_table([make_site("a", (3, 6))], [[9.0]], [1e-9], on=[False])
    plan = make_scheduler(limit=15).plan(table, 10)
    assert (plan.ranks.tolist(), plan.magnitudes.tolist()) == ([1], [True])
    assert not make_scheduler(limit=14).plan(table, 10).magnitudes[0]


@settings(max_examples=60)
@given(tables(), st.sampled_from(FREE), st.integers(0, 80), st.floats(0, 1))
def test_births_and_returning_magnitudes_stay_within_the_allowance(table, policy, step, recycle):
    on = table.magnitudes.on
    limit = max(
        cost_by_hand(table, table.ranks, on),
        cost_by_hand(table, table.min_ranks, [False] * len(on)),
    )
    scheduler = make_scheduler(policy, limit=limit, recycle=recycle, protect=0)
    plan = scheduler.plan(table, step)
    born = int(table.component_costs @ plan.births)
    budgeted = np.array([site.is_budgeted for site in table.sites])
    turned_on = int(table.magnitude_costs @ (plan.magnitudes & ~on & budgeted))
    free = limit - cost_by_hand(table, table.ranks, on)
    assert born + turned_on <= free + recycle * (80 - step) / 80 * limit


def test_the_end_of_the_window_moves_nothing():
    sites = [make_site("a", (3, 6)), make_site("b", (2, 4), magnitude="absent")]
    table = make_table(sites, [[9.0], [1.0]], [50.0, 0.0], on=[False, False])
    limit = cost_by_hand(table, [1, 1], [False, False])
    scheduler = make_scheduler(limit=limit, recycle=1.0)
    assert scheduler.plan(table, 10).magnitudes[0]
    assert not scheduler.plan(table, 80).magnitudes[0]


@pytest.mark.parametrize("gates", [{"has_gate": True}, {"has_gate": True, "has_row_gate": True}])
def test_a_magnitude_costs_its_rows_whatever_its_site_is_made_of(gates):
    site = SiteInfo("a", "linear", 6, 4, True, 0, 4, is_budgeted=True, **gates)
    _, pool = with_pools([site])
    assert (pool.component_cost, pool.fixed_cost) == (4, 0)
