import itertools
import math

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.statistics.intervals import bootstrap_interval, interval, student_interval
from rankflow.errors import RankFlowError

RNG = np.random.default_rng(8)
ONE = RNG.normal(0.3, 1, 7)
TWO = RNG.normal(-0.2, 3, 4)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_one_tasks_interval_is_students(make_pairs, level):
    expected = stats.ttest_1samp(ONE, 0).confidence_interval(level)
    assert student_interval(make_pairs(ONE), level=level) == pytest.approx(tuple(expected))


def test_two_tasks_interval_is_welchs(make_pairs):
    # The mean of two means is half the difference of the first from minus the second.
    expected = stats.ttest_ind(ONE, -TWO, equal_var=False).confidence_interval(0.95)
    assert student_interval(make_pairs(ONE, TWO)) == pytest.approx(
        (expected.low / 2, expected.high / 2)
    )


def _every_resample(tasks, level):
    """The studentised interval from all resamples instead of random ones."""

    def estimate(samples):
        variance = sum(np.var(s, ddof=1) / len(s) for s in samples) / len(samples) ** 2
        return np.mean([np.mean(s) for s in samples]), math.sqrt(variance)

    middle, error = estimate(tasks)
    ratios = []
    for samples in itertools.product(*(itertools.product(t, repeat=len(t)) for t in tasks)):
        shifted, spread = estimate(samples)
        with np.errstate(divide="ignore"):
            ratios.append(np.float64(shifted - middle) / (spread if spread > 1e-12 else 0.0))
    low, high = np.quantile(ratios, [(1 - level) / 2, (1 + level) / 2], method="nearest")
    return middle - high * error, middle - low * error


@pytest.mark.parametrize("tasks", [(ONE[:5],), (ONE[:3], TWO[:3]), (ONE[:2], TWO)])
def test_the_bootstrap_is_that_over_all_resamples(make_pairs, tasks):
    level = 0.8  # where resamples without spread do not yet reach
    found = bootstrap_interval(make_pairs(*tasks), level=level, resamples=200_000)
    # Resamples are few and discrete, so neighbouring quantiles differ by some per cent.
    assert found == pytest.approx(_every_resample(tasks, level), rel=0.05)


def test_the_bootstrap_is_scipys_where_the_error_is_known(make_pairs):
    # With many pairs the studentised interval comes close to the BCa interval.
    values = np.random.default_rng(0).lognormal(0, 0.5, 400)
    scipys = stats.bootstrap(
        (values,), np.mean, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    found = bootstrap_interval(make_pairs(values))
    assert found == pytest.approx(tuple(scipys), rel=0.01)


def test_the_bootstrap_follows_the_skew(make_pairs):
    values = np.random.default_rng(0).lognormal(0, 1, 12)
    low, high = bootstrap_interval(make_pairs(values))
    assert high - values.mean() > 1.3 * (values.mean() - low)


def test_three_pairs_leave_the_bootstrap_without_bounds(make_pairs):
    assert bootstrap_interval(make_pairs(ONE[:3])) == (-math.inf, math.inf)
    assert np.isfinite(student_interval(make_pairs(ONE[:3]))).all()


def test_a_resample_may_lie_exactly_at_the_mean(make_pairs):
    low, high = bootstrap_interval(make_pairs([-1.0, 0.0, 1.0] * 2))
    assert low < 0 < high
    assert bootstrap_interval(make_pairs([-1.0, 0.0, 1.0])) == (-math.inf, math.inf)


def test_the_seed_decides_the_bootstrap(make_pairs):
    pairs = make_pairs(ONE, TWO)
    found = interval(pairs, "bootstrap", seed=1)
    assert found == interval(pairs, "bootstrap", seed=1)
    assert found != interval(pairs, "bootstrap", seed=2)
    assert interval(pairs) == bootstrap_interval(pairs)


def test_fewer_than_five_pairs_have_students_interval(make_pairs):
    pairs = make_pairs(ONE[:4])
    assert interval(pairs) == student_interval(pairs)


def test_a_bootstrap_that_one_pair_far_out_decides_gives_way_to_students(make_pairs):
    pairs = make_pairs([0.01 * i for i in range(9)] + [5.0])
    low, high = bootstrap_interval(pairs)
    assert high - low > 2 * np.subtract(*student_interval(pairs)[::-1])
    assert interval(pairs) == student_interval(pairs)


@pytest.mark.parametrize("kind", ["student", "bootstrap"])
def test_intervals_of_little(make_pairs, kind):
    assert interval(make_pairs([0.5, 0.5], [0.25, 0.25]), kind) == (0.375, 0.375)
    for few in ([], [0.5]):
        assert np.isnan(interval(make_pairs(few), kind)).all()


@pytest.mark.parametrize("kind", ["student", "bootstrap"])
def test_a_confidence_lies_between_0_and_1(make_pairs, kind):
    with pytest.raises(RankFlowError, match="got 95"):
        interval(make_pairs(ONE), kind, level=95)
