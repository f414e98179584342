import math

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.statistics.intervals import student_interval
from rankflow.ablation.statistics.paired import (
    effect_size,
    equivalence_p,
    mean,
    standard_error,
    weights,
)
from rankflow.errors import RankFlowError

RNG = np.random.default_rng(3)
ONE = RNG.normal(0.3, 1, 7)
TWO = RNG.normal(-0.2, 3, 4)


def test_each_task_counts_the_same(make_pairs):
    pairs = make_pairs(ONE, TWO)
    assert mean(pairs) == pytest.approx((ONE.mean() + TWO.mean()) / 2)
    assert weights(pairs).sum() == pytest.approx(1)


def test_one_tasks_error_is_that_of_its_mean(make_pairs):
    assert standard_error(make_pairs(ONE)) == pytest.approx((stats.sem(ONE), 6))


def test_two_tasks_error_is_that_of_welchs_test(make_pairs):
    # The mean of two means is half the difference of the first from minus the second.
    welch = stats.ttest_ind(ONE, -TWO, equal_var=False)
    pairs = make_pairs(ONE, TWO)
    error, freedom = standard_error(pairs)
    assert freedom == pytest.approx(welch.df)
    assert mean(pairs) / error == pytest.approx(welch.statistic)


def test_tasks_with_single_pairs_are_the_sample(make_pairs):
    values = [0.1, 0.4, -0.3, 0.2]
    pairs = make_pairs(*([value] for value in values))
    assert standard_error(pairs) == pytest.approx((stats.sem(values), 3))


def test_differences_between_tasks_are_noise_only_where_a_task_has_no_spread(make_pairs):
    far = [x + 100 for x in TWO]
    assert standard_error(make_pairs(ONE, far)) == pytest.approx(
        standard_error(make_pairs(ONE, TWO))
    )
    assert standard_error(make_pairs(ONE, far[:1]))[0] > 10


def test_a_shift_or_a_unit_does_not_change_what_is_noise(make_pairs):
    error, freedom = standard_error(make_pairs(ONE, TWO))
    tiny = standard_error(make_pairs(1e-170 * ONE, 1e-170 * TWO))
    assert tiny == (0, 9)  # its square is below the smallest float
    small = standard_error(make_pairs(1e-120 * ONE, 1e-120 * TWO))
    assert small == pytest.approx((1e-120 * error, freedom), rel=1e-9, abs=0)


def test_d_z_is_the_mean_over_the_spread(make_pairs):
    assert effect_size(make_pairs(ONE)) == pytest.approx(ONE.mean() / np.std(ONE, ddof=1))
    assert effect_size(make_pairs([0.0, 0.0])) == 0
    assert effect_size(make_pairs([-1.0, -1.0])) == -math.inf
    assert math.isnan(effect_size(make_pairs([1.0])))


@pytest.mark.parametrize("margin", [0.05, 0.5, 2.0])
def test_equivalence_is_two_one_sided_t_tests(make_pairs, margin):
    above = stats.ttest_1samp(ONE, -margin, alternative="greater").pvalue
    below = stats.ttest_1samp(ONE, margin, alternative="less").pvalue
    assert equivalence_p(make_pairs(ONE), margin) == pytest.approx(max(above, below))


def test_equivalence_is_the_90_per_cent_interval_within_the_margin(make_pairs):
    pairs = make_pairs(ONE, TWO)
    reach = max(map(abs, student_interval(pairs, level=0.9)))
    assert equivalence_p(pairs, reach * 1.001) < 0.05 < equivalence_p(pairs, reach * 0.999)


def test_differences_all_alike_are_within_a_margin_or_not(make_pairs):
    pairs = make_pairs([0.5, 0.5], [0.5, 0.5, 0.5])
    assert [equivalence_p(pairs, margin) for margin in (0.4, 0.6)] == [1, 0]


def test_fewer_than_two_pairs_show_nothing(make_pairs):
    for pairs in (make_pairs([]), make_pairs([0.0])):
        assert np.isnan(standard_error(pairs)).all()
        assert equivalence_p(pairs, 1.0) == 1


@pytest.mark.parametrize("margin", [0.0, -0.01, math.nan, math.inf])
def test_a_margin_is_positive(make_pairs, margin):
    with pytest.raises(RankFlowError, match=rf"margin .* positive and finite, got {margin}"):
        equivalence_p(make_pairs(ONE), margin)
