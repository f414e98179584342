import math

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.statistics.power import (
    MOST_PAIRS,
    can_reach,
    fewest_pairs,
    paired_power,
    pairs_needed,
    smallest_p,
)
from rankflow.ablation.statistics.signflip import sign_flip_p
from rankflow.errors import RankFlowError


@pytest.mark.parametrize("pairs", [1, 2, 5, 6, 10])
def test_the_smallest_p_value_is_that_of_pairs_that_all_agree(make_pairs, pairs):
    values = np.arange(1.0, pairs + 1)
    assert smallest_p(pairs) == sign_flip_p(make_pairs(values))
    assert smallest_p(pairs) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)


def test_five_pairs_cannot_be_significant():
    assert not can_reach(5)
    assert can_reach(6)
    assert can_reach(5, alpha=0.1)
    assert not can_reach(0)
    assert can_reach(6, alpha=2 / 2**6)


@pytest.mark.parametrize("comparisons", [1, 2, 3, 4, 10])
def test_more_comparisons_take_more_pairs(comparisons):
    fewest = fewest_pairs(comparisons=comparisons)
    assert comparisons * smallest_p(fewest) <= 0.05 < comparisons * smallest_p(fewest - 1)


@pytest.mark.parametrize(("effect", "pairs", "alpha"), [(0.5, 20, 0.05), (1, 8, 0.01), (0, 9, 0.1)])
def test_power_is_the_share_of_tests_that_reject(effect, pairs, alpha):
    draws = np.random.default_rng(pairs).normal(effect, 1, (20_000, pairs))
    share = (stats.ttest_1samp(draws, 0, axis=1).pvalue <= alpha).mean()
    power = paired_power(effect, pairs, alpha)
    # Four standard errors of a share of 20,000 draws.
    assert power == pytest.approx(share, abs=4 * math.sqrt(power * (1 - power) / 20_000))
    assert power == paired_power(-effect, pairs, alpha)


def test_power_grows_with_the_effect_and_is_never_nan():
    # scipy's noncentral t, and scipy.special.ncfdtr, are NaN for some of these.
    for pairs in (6, 7, 20, 100, 10_000, 1_000_000):
        powers = [paired_power(effect, pairs) for effect in [0, *np.logspace(-6, 5, 200)]]
        assert min(np.diff(powers)) > -1e-9
        assert (powers[0], powers[-1]) == pytest.approx((0.05, 1))


@pytest.mark.parametrize("effect", [0.01, 0.2, 0.5, -0.5, 1.0, 1.3])
@pytest.mark.parametrize("comparisons", [1, 4])
def test_pairs_needed_are_the_fewest_with_enough_power(effect, comparisons):
    needed = pairs_needed(effect, comparisons=comparisons)
    level = 0.05 / comparisons
    assert paired_power(effect, needed, level) >= 0.8 > paired_power(effect, needed - 1, level)


def test_pairs_needed_are_those_of_the_tables():
    # Cohen's tables and G*Power: two-sided paired t test, alpha 0.05, power 0.8.
    assert [pairs_needed(effect) for effect in (0.2, 0.5, 0.8)] == [199, 34, 15]


def test_the_sign_flip_test_has_the_power_promised(make_pairs):
    pairs = pairs_needed(0.8)
    draws = np.random.default_rng(0).normal(0.8, 1, (1000, pairs))
    share = np.mean([sign_flip_p(make_pairs(draw)) <= 0.05 for draw in draws])
    # Four standard errors of a share of 1,000 draws are 0.05.
    assert share == pytest.approx(0.8, abs=0.05)


def test_never_fewer_pairs_than_can_be_significant():
    assert pairs_needed(9.0) == pairs_needed(math.inf) == pairs_needed(-math.inf) == 6
    assert pairs_needed(9.0, comparisons=4) == 8


def test_no_number_of_pairs_finds_no_effect():
    assert pairs_needed(0.0) is None
    assert pairs_needed(math.nan) is None
    assert pairs_needed(1e-4) is None
    assert MOST_PAIRS / 2 < pairs_needed(0.003) < MOST_PAIRS


@pytest.mark.parametrize("level", [0, 1, -0.1, math.nan])
def test_levels_lie_between_0_and_1(level):
    with pytest.raises(RankFlowError, match="strictly between 0 and 1, got"):
        pairs_needed(0.5, level)
    with pytest.raises(RankFlowError, match="strictly between 0 and 1, got"):
        pairs_needed(0.5, power=level)
    with pytest.raises(RankFlowError, match="strictly between 0 and 1, got"):
        fewest_pairs(level)
