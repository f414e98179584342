from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.allocation.policies import (
    POLICIES,
    allocate_knapsack,
    check_feasible,
    feasible_range,
    frozen_policy,
    knapsack,
    knapsack_exact,
    make_policy,
    plan_from_ranks,
    proportional,
    random_policy,
    threshold,
    uniform,
)
from rankflow.errors import BudgetError, RankFlowError, SpecError
from rankflow.records import ComponentTable, SiteInfo

FREE = [name for name in POLICIES if name != "frozen"]
SCORED = [threshold, knapsack, knapsack_exact, proportional]


def make_site(name="site", features=(5, 5), *, magnitude=False, bounds=(0, 8)):
    return SiteInfo(name, "linear", *features, magnitude, *bounds)


def make_table(sites, scores):
    """Build a table from one list of scores for each site."""
    flat = np.array([score for of_site in scores for score in of_site], dtype=float)
    return ComponentTable(
        sites=tuple(sites),
        ranks=np.array([len(of_site) for of_site in scores], dtype=np.int64),
        scores=flat,
        ages=np.zeros(len(flat), dtype=np.int64),
        demand=np.zeros(len(sites)),
    )


def scores_of(table):
    return np.split(table.scores, np.cumsum(table.ranks)[:-1])


def kept_score(table, ranks):
    """Total score of the best components up to the given ranks."""
    return sum(
        np.sort(scores)[::-1][:rank].sum()
        for scores, rank in zip(scores_of(table), ranks, strict=True)
    )


def best_by_enumeration(table, limit):
    """The greatest kept score over all rank patterns that ask for no birth above the minimum."""
    choices = [
        range(site.min_rank, max(site.min_rank, min(site.max_rank, live)) + 1)
        for site, live in zip(table.sites, table.ranks, strict=True)
    ]
    patterns = (np.array(pattern) for pattern in product(*choices))
    return max(kept_score(table, p) for p in patterns if table.cost_of(p) <= limit)


def threshold_by_loop(table, limit):
    """The threshold policy as one would do it by hand."""
    ranks = table.min_ranks.copy()
    offers = []
    for index, (site, scores) in enumerate(zip(table.sites, scores_of(table), strict=True)):
        ordered = sorted(enumerate(scores), key=lambda entry: (-entry[1], entry[0]))
        for component, score in ordered[site.min_rank : site.max_rank]:
            offers.append((-score, index, component))
    for _, index, _ in sorted(offers):
        ranks[index] += 1
        if table.cost_of(ranks) > limit:
            ranks[index] -= 1
            break
    return ranks


@st.composite
def sites(draw):
    lowest = draw(st.integers(0, 2))
    return make_site(
        name=draw(st.sampled_from("abc")),
        features=draw(st.sampled_from([(8, 8), (8, 32), (32, 8), (3, 50), (7, 4)])),
        magnitude=draw(st.booleans()),
        bounds=(lowest, draw(st.integers(lowest, 5))),
    )


@st.composite
def problems(draw, most_sites=5):
    """A table (dead, newborn and overfull sites included) and a limit that is feasible for it."""
    chosen = draw(st.lists(sites(), min_size=1, max_size=most_sites))
    score = st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1000))
    table = make_table(chosen, [draw(st.lists(score, max_size=6)) for _ in chosen])
    lowest, highest = feasible_range(chosen)
    return table, draw(st.integers(lowest, highest + 5))


def random_table(seed, count=6):
    """A table of which no two scores and no two solutions are equal."""
    rng = np.random.default_rng(seed)
    shapes = [(768, 768), (768, 3072), (4096, 1024)]
    chosen = [
        make_site(f"site{i}", shapes[rng.integers(3)], magnitude=bool(rng.integers(2)))
        for i in range(count)
    ]
    table = make_table(chosen, [rng.lognormal(0, 1, rng.integers(1, 5)) for _ in chosen])
    lowest, _ = feasible_range(chosen)
    return table, int(lowest + rng.uniform(0.2, 0.8) * (table.cost_of(table.ranks) - lowest))


# What holds for every policy


@pytest.mark.parametrize("name", FREE)
@settings(deadline=None)
@given(problem=problems())
def test_ranks_keep_the_limit_and_the_bounds_of_every_site(name, problem):
    table, limit = problem
    ranks = make_policy(name, seed=3)(table, limit)
    assert table.cost_of(ranks) <= limit
    assert np.all((table.min_ranks <= ranks) & (ranks <= table.max_ranks))
    assert ranks.dtype == np.int64


@pytest.mark.parametrize("name", FREE)
@settings(deadline=None)
@given(problem=problems())
def test_a_limit_of_the_minimum_gives_the_minimum_and_an_ample_one_all_that_is_asked(name, problem):
    table, _ = problem
    lowest, highest = feasible_range(table.sites)
    policy = make_policy(name, seed=3)
    assert policy(table, lowest).tolist() == table.min_ranks.tolist()
    wanted = table.max_ranks
    if name in ("threshold", "knapsack", "knapsack-exact"):
        wanted = np.clip(table.ranks, table.min_ranks, table.max_ranks)
    assert policy(table, highest).tolist() == wanted.tolist()


@pytest.mark.parametrize("name", FREE)
@settings(deadline=None)
@given(problem=problems())
def test_the_same_table_gives_the_same_ranks_and_is_left_as_it_was(name, problem):
    table, limit = problem
    copy = replace(table, ranks=table.ranks.copy(), scores=table.scores.copy())
    ranks = make_policy(name, seed=3)(table, limit)
    assert make_policy(name, seed=3)(copy, limit).tolist() == ranks.tolist()
    assert table.scores.tolist() == copy.scores.tolist()
    assert table.ranks.tolist() == copy.ranks.tolist()


@pytest.mark.parametrize("policy", SCORED)
@pytest.mark.parametrize("seed", range(20))
def test_the_order_of_the_sites_does_not_matter_to_a_policy_that_scores(policy, seed):
    table, limit = random_table(seed)
    order = np.random.default_rng(seed).permutation(len(table.sites))
    scores = scores_of(table)
    shuffled = make_table([table.sites[i] for i in order], [scores[i] for i in order])
    assert policy(shuffled, limit).tolist() == policy(table, limit)[order].tolist()


@pytest.mark.parametrize("policy", SCORED)
def test_the_scale_of_the_scores_does_not_matter(policy):
    table, limit = random_table(5)
    scaled = replace(table, scores=table.scores * 2.0**-40)
    assert policy(scaled, limit).tolist() == policy(table, limit).tolist()


@pytest.mark.parametrize("name", FREE)
def test_a_limit_below_the_minimum_ranks_is_refused_with_the_feasible_range(name):
    chosen = [make_site(magnitude=True, bounds=(2, 4)), make_site(bounds=(1, 4))]
    table = make_table(chosen, [[1.0], [1.0]])
    assert feasible_range(chosen) == (35, 85)
    with pytest.raises(BudgetError, match=r"34 parameters is less than the 35 .* 2 sites .* 85"):
        make_policy(name)(table, 34)


def test_the_cost_of_the_minimum_ranks_is_just_feasible():
    check_feasible([make_site(magnitude=True, bounds=(2, 4))], 25)
    with pytest.raises(BudgetError):
        check_feasible([make_site(magnitude=True, bounds=(2, 4))], 24)


@pytest.mark.parametrize("score", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("policy", SCORED)
def test_a_score_that_is_no_worth_is_refused_with_its_site(policy, score):
    table = make_table([make_site("q_proj"), make_site("k_proj")], [[1.0, 2.0], [3.0, score]])
    with pytest.raises(RankFlowError, match=f"at least 0, but k_proj has .* score {score}"):
        policy(table, 30)
    with pytest.raises(RankFlowError, match="k_proj"):
        plan_from_ranks(table, np.array([1, 1]))


# Plans


def test_a_plan_keeps_the_best_components_and_gives_birth_to_the_missing():
    table = make_table([make_site()] * 4, [[3, 9, 5], [1], [], [2, 4]])
    plan = plan_from_ranks(table, np.array([2, 3, 1, 0]))
    assert [keep.tolist() for keep in plan.keep] == [[1, 2], [0], [], []]
    assert plan.births.tolist() == [0, 2, 1, 0]


def test_of_equal_scores_the_lower_index_stays():
    plan = plan_from_ranks(make_table([make_site()], [[5, 7, 5, 5]]), np.array([3]))
    assert plan.keep[0].tolist() == [0, 1, 2]


@settings(deadline=None)
@given(problem=problems(), data=st.data())
def test_a_plan_reaches_its_ranks_and_drops_no_component_better_than_a_kept_one(problem, data):
    table, _ = problem
    ranks = np.array([data.draw(st.integers(0, 8)) for _ in table.sites])
    plan = plan_from_ranks(table, ranks)
    assert plan.ranks.tolist() == ranks.tolist()
    for scores, keep, births in zip(scores_of(table), plan.keep, plan.births, strict=True):
        assert keep.tolist() == sorted(set(keep.tolist()))
        assert births == 0 or len(keep) == len(scores)
        dropped = np.delete(scores, keep)
        assert not (len(keep) and len(dropped)) or scores[keep].min() >= dropped.max()


# Threshold


@settings(deadline=None)
@given(problem=problems())
def test_threshold_equals_a_loop_over_the_sorted_components(problem):
    assert threshold(*problem).tolist() == threshold_by_loop(*problem).tolist()


def test_threshold_stops_at_the_first_component_that_does_not_fit():
    table = make_table([make_site(), make_site(features=(20, 20))], [[9, 2], [5]])
    assert threshold(table, 30).tolist() == [1, 0]
    assert knapsack(table, 30).tolist() == [2, 0]


def test_threshold_pays_for_births_up_to_the_minimum_rank():
    table = make_table([make_site(bounds=(2, 8)), make_site()], [[], [1, 1, 1]])
    assert threshold(table, 40).tolist() == [2, 2]


# Knapsack


@pytest.mark.parametrize("policy", [knapsack, knapsack_exact])
@settings(deadline=None)
@given(problem=problems(most_sites=4))
def test_knapsack_equals_the_best_of_all_rank_patterns(policy, problem):
    table, limit = problem
    ranks = policy(table, limit)
    assert np.all(ranks <= np.maximum(table.ranks, table.min_ranks))
    assert kept_score(table, ranks) == pytest.approx(best_by_enumeration(table, limit))


@pytest.mark.parametrize("seed", range(30))
def test_knapsack_equals_the_best_of_all_rank_patterns_of_a_transformer(seed):
    table, limit = random_table(seed)
    best = best_by_enumeration(table, limit)
    for exact in (False, True):
        result = allocate_knapsack(table, limit, exact=exact)
        assert kept_score(table, result.ranks) == pytest.approx(best, rel=1e-12)
        assert result.value == pytest.approx(best, rel=1e-12)
        assert result.upper_bound == pytest.approx(best, rel=1e-12)


def test_knapsack_spreads_equal_components_over_the_sites():
    table = make_table([make_site()] * 4, [[0.0] * 5] * 4)
    assert knapsack(table, 90).tolist() == [3, 2, 2, 2]


@pytest.mark.parametrize("policy", [knapsack, knapsack_exact])
@given(count=st.integers(1, 5), limit=st.integers(0, 260), score=st.sampled_from([0.0, 0.3]))
def test_components_of_equal_score_are_shared_out_from_the_first_site_on(
    policy, count, limit, score
):
    table = make_table([make_site()] * count, [[score] * 5] * count)
    share, over = divmod(min(limit // 10, 5 * count), count)
    assert policy(table, limit).tolist() == [share + (site < over) for site in range(count)]


@given(count=st.integers(1, 5), limit=st.integers(0, 260), score=st.sampled_from([0.0, 0.3]))
def test_the_threshold_keeps_the_first_components_of_equal_score(count, limit, score):
    table = make_table([make_site()] * count, [[score] * 5] * count)
    kept = [int(np.clip(limit // 10 - 5 * site, 0, 5)) for site in range(count)]
    assert threshold(table, limit).tolist() == kept


@pytest.mark.parametrize("policy", [knapsack, knapsack_exact])
@settings(deadline=None)
@given(problem=problems(), score=st.sampled_from([0.0, 0.3]))
def test_no_component_that_fits_is_dropped_where_all_scores_are_equal(policy, problem, score):
    table, limit = problem
    level = replace(table, scores=np.full_like(table.scores, score))
    ranks = policy(level, limit)
    dropped = ranks < np.minimum(table.ranks, table.max_ranks)
    assert (table.component_costs[dropped] > limit - table.cost_of(ranks)).all()


# Proportional


@pytest.mark.parametrize(
    ("limit", "ranks"),
    [
        (100, [5, 3, 2]),
        (109, [5, 3, 2]),
        (110, [6, 3, 2]),  # ideal 5.5, 3.3, 2.2
        (130, [6, 4, 3]),  # ideal 6.5, 3.9, 2.6: the largest remainders first
    ],
)
def test_proportional_shares_the_parameters_by_score(limit, ranks):
    table = make_table([make_site()] * 3, [[20, 30], [30], [20]])
    assert proportional(table, limit).tolist() == ranks


def test_proportional_shares_parameters_not_ranks():
    table = make_table([make_site(), make_site(features=(10, 10))], [[1], [1]])
    assert proportional(table, 80).tolist() == [4, 2]


def test_what_a_full_site_cannot_use_goes_to_the_others_in_proportion():
    chosen = [make_site(bounds=(0, 4)), make_site(), make_site()]
    table = make_table(chosen, [[50], [30], [20]])
    assert proportional(table, 90).tolist() == [4, 3, 2]


def test_what_a_site_needs_at_least_is_taken_from_the_others_in_proportion():
    chosen = [make_site(), make_site(), make_site(bounds=(2, 8))]
    table = make_table(chosen, [[50], [30], [0]])
    assert proportional(table, 100).tolist() == [5, 3, 2]


def test_a_site_without_score_gets_only_what_the_others_cannot_use():
    table = make_table([make_site(), make_site(), make_site()], [[1], [], [0]])
    assert proportional(table, 80).tolist() == [8, 0, 0]
    assert proportional(table, 120).tolist() == [8, 2, 2]


@settings(deadline=None)
@given(problem=problems())
def test_proportional_without_any_score_is_uniform(problem):
    table, limit = problem
    silent = replace(table, scores=np.zeros_like(table.scores))
    assert proportional(silent, limit).tolist() == uniform(table, limit).tolist()


# Uniform


@settings(deadline=None)
@given(problem=problems())
def test_uniform_is_the_largest_equal_rank_that_fits_and_one_more_where_possible(problem):
    table, limit = problem
    equal = [np.clip(rank, table.min_ranks, table.max_ranks) for rank in range(8)]
    level = max(rank for rank in range(7) if table.cost_of(equal[rank]) <= limit)
    ranks = uniform(table, limit)
    assert np.all((equal[level] <= ranks) & (ranks <= equal[level + 1]))
    could_rise = ranks < equal[level + 1]
    spare = limit - table.cost_of(ranks)
    assert np.all(table.component_costs[could_rise] > spare)


@pytest.mark.parametrize("extras", [1, 14, 24, 28, 56, 84, 126, 167])
def test_uniform_spreads_the_rest_over_the_depth_and_over_the_kinds_of_site(extras):
    table = make_table([make_site()] * 168, [[]] * 168)  # 24 blocks of 7 sites
    extra = uniform(table, 10 * (168 * 3 + extras)) - 3
    assert set(extra.tolist()) <= {0, 1}
    assert extra.sum() == extras
    even = np.arange(1, 169) * extras / 168
    assert np.abs(np.cumsum(extra) - even).max() <= 2.5
    by_kind = extra.reshape(24, 7).sum(axis=0)
    assert np.abs(by_kind - extras / 7).max() <= 4


# Controls


@settings(deadline=None)
@given(problem=problems(), less=st.floats(0, 1), seed=st.integers(0, 5))
def test_a_smaller_limit_gives_no_site_more_by_random(problem, less, seed):
    table, limit = problem
    lowest, _ = feasible_range(table.sites)
    smaller = int(lowest + less * (limit - lowest))
    policy = random_policy(seed)
    assert np.all(policy(table, smaller) <= policy(table, limit))


def test_random_ranks_depend_on_the_seed_and_not_on_what_was_learned():
    chosen = [make_site(f"site{i}") for i in range(30)]
    young = make_table(chosen, [[1.0]] * 30)
    old = make_table(chosen, [[float(i)] * (i % 5) for i in range(30)])
    policy = random_policy(7)
    assert policy(young, 1000).tolist() == policy(old, 1000).tolist()
    assert policy(young, 1000).tolist() != random_policy(8)(young, 1000).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_random_ranks_use_the_budget_up_to_one_component_and_differ_between_sites(seed):
    table = make_table([make_site(bounds=(0, 50))] * 40, [[]] * 40)
    ranks = random_policy(seed)(table, 4009)
    assert table.cost_of(ranks) == 4000
    assert len(set(ranks.tolist())) > 8


def test_a_frozen_policy_returns_its_pattern_whatever_the_scores():
    table = make_table([make_site()] * 3, [[1], [100], [0]])
    policy = frozen_policy(np.array([4, 0, 2]))
    policy(table, 60)[:] = 0
    assert policy(table, 60).tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ([4, 0, 3], "costs 75 parameters, but the budget is 74"),
        ([4, 0], "has 2 ranks, but there are 3 sites"),
        ([9, 0, 2], "gives first rank 9, but it must lie between 0 and 8"),
        ([4, -1, 2], "gives second rank -1, but it must lie between 0 and 8"),
    ],
)
def test_a_frozen_pattern_that_does_not_fit_is_refused(pattern, message):
    chosen = [make_site("first"), make_site("second"), make_site("third", magnitude=True)]
    with pytest.raises(BudgetError, match=message):
        frozen_policy(np.array(pattern))(make_table(chosen, [[1], [1], [1]]), 74)


# Names


def test_a_name_finds_its_policy():
    table, limit = random_table(1)
    pattern = np.array([1, 0, 1, 0, 1, 0])
    expected = {
        "threshold": threshold,
        "knapsack": knapsack,
        "knapsack-exact": knapsack_exact,
        "proportional": proportional,
        "uniform": uniform,
        "random": random_policy(4),
        "frozen": frozen_policy(pattern),
    }
    assert set(expected) == set(POLICIES)
    for name, policy in expected.items():
        found = make_policy(name, seed=4, pattern=pattern)
        assert found(table, limit).tolist() == policy(table, limit).tolist()


def test_an_unknown_policy_is_refused_with_the_known_names():
    with pytest.raises(SpecError, match="'greedy'; choose one of threshold, knapsack, "):
        make_policy("greedy")


def test_a_frozen_policy_needs_its_pattern():
    with pytest.raises(SpecError, match="'frozen' needs a pattern"):
        make_policy("frozen")
