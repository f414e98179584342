import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import stats

from rankflow.ablation.statistics import signflip
from rankflow.ablation.statistics.signflip import sign_flip_p


def _enumerated(*tasks):
    """The share of all sign patterns whose mean of task means is at least as far from 0."""
    sizes = np.cumsum([len(t) for t in tasks])[:-1]
    flat = np.concatenate(tasks)

    def statistic(values):
        return abs(np.mean([part.mean() for part in np.split(values, sizes)]))

    seen = statistic(flat)
    flipped = [
        statistic(flat * signs) >= seen - 1e-9
        for signs in itertools.product((1, -1), repeat=len(flat))
    ]
    return np.mean(flipped)


@pytest.mark.parametrize("sizes", [(1,), (2,), (3, 4), (5, 2, 3), (1, 1, 1, 1), (9,)])
def test_the_p_value_counts_all_sign_patterns(make_pairs, sizes):
    rng = np.random.default_rng(sum(sizes))
    for shift in (0.0, 0.7, 3.0):
        tasks = [rng.normal(shift, 1, size) for size in sizes]
        assert sign_flip_p(make_pairs(*tasks)) == pytest.approx(_enumerated(*tasks))


@settings(
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # it makes, and holds nothing
)
@given(values=st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_patterns_that_tie_with_the_one_seen_count(make_pairs, values):
    tenths = np.array(values) / 10  # sums of tenths round differently in different orders
    assert sign_flip_p(make_pairs(tenths)) == pytest.approx(_enumerated(tenths))


def test_the_p_value_is_scipys(make_pairs):
    values = np.random.default_rng(1).normal(0.4, 1, 14)
    scipys = stats.permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert sign_flip_p(make_pairs(values)) == pytest.approx(scipys.pvalue)


def test_all_pairs_agreeing_give_the_smallest_p_value(make_pairs):
    for pairs in (5, 6, 30, signflip.MOST_EXACT):
        values = np.random.default_rng(pairs).uniform(1, 2, pairs)
        assert sign_flip_p(make_pairs(values)) == 2.0 ** (1 - pairs)
        assert sign_flip_p(make_pairs(-values)) == 2.0 ** (1 - pairs)


def test_no_difference_and_no_pair_have_p_value_1(make_pairs):
    assert sign_flip_p(make_pairs([0.0] * 8)) == 1
    assert sign_flip_p(make_pairs([0.1, -0.1] * 4)) == 1
    assert sign_flip_p(make_pairs([])) == 1


def test_the_unit_does_not_matter(make_pairs):
    values = np.random.default_rng(2).normal(0.5, 1, 12)
    p = sign_flip_p(make_pairs(values))
    assert [sign_flip_p(make_pairs(values * unit)) for unit in (1e-200, -1e-9, 1e200)] == [p] * 3


def test_random_patterns_agree_with_all_of_them(make_pairs, monkeypatch):
    pairs = make_pairs(*np.random.default_rng(4).normal(0.3, 1, (2, 9)))
    exact = sign_flip_p(pairs)
    monkeypatch.setattr(signflip, "MOST_EXACT", 10)
    p = sign_flip_p(pairs, seed=5)
    assert p != exact
    assert p == sign_flip_p(pairs, seed=5) != sign_flip_p(pairs, seed=6)
    # Four standard errors of a share of 100,000 draws.
    assert p == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / signflip.FLIPS))


def test_a_p_value_of_random_patterns_is_never_0(make_pairs):
    pairs = make_pairs(np.ones(signflip.MOST_EXACT + 5))
    assert sign_flip_p(pairs) == 1 / (signflip.FLIPS + 1)
