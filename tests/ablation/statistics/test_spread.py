import math

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.statistics.spread import spread
from rankflow.errors import RankFlowError


def test_the_interval_is_students():
    scores = np.random.default_rng(0).normal(1, 1, 5)
    found = spread(scores, level=0.9)
    assert (found.low, found.high) == pytest.approx(
        tuple(stats.ttest_1samp(scores, 0).confidence_interval(0.9))
    )
    assert (found.mean, found.n, found.broken) == (pytest.approx(scores.mean()), 5, 0)


def test_scores_that_diverged_are_counted_and_left_out():
    found = spread([1.0, math.nan, 3.0, math.inf])
    assert (found.mean, found.n, found.broken) == (2, 2, 2)
    assert found.low == spread([1.0, 3.0]).low


def test_too_few_scores_have_no_interval():
    single, none = spread([1.5]), spread([math.nan])
    assert (single.mean, single.n) == (1.5, 1)
    assert math.isnan(none.mean)
    assert np.isnan([single.low, single.high, none.low, none.high]).all()


def test_a_confidence_lies_between_0_and_1():
    with pytest.raises(RankFlowError, match=r"got 1\.5"):
        spread([1.0, 2.0], level=1.5)
