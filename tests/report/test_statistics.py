import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import entropy

from rankflow.report.statistics import churn, mean_score, per_parameter, rank_entropy

RANKS = st.lists(st.integers(0, 64), min_size=2, max_size=20)


@given(RANKS.filter(any))
def test_entropy_agrees_with_scipy_and_stays_between_0_and_1(ranks):
    value = rank_entropy(ranks)
    assert value == pytest.approx(entropy(ranks, base=len(ranks)), abs=1e-12)
    assert 0 <= value <= 1


@pytest.mark.parametrize("sites", range(1, 60))
def test_entropy_of_equal_ranks_is_one(sites):
    assert rank_entropy([5] * sites) == pytest.approx(1, abs=1e-14)


def test_entropy_without_components_is_zero():
    assert rank_entropy([0, 0, 0]) == 0
    assert rank_entropy([0]) == 0


@given(st.sets(st.integers(0, 20)), st.sets(st.integers(0, 20)))
def test_churn_is_the_dice_distance_of_the_components(before, after):
    value = churn(len(before), len(before - after), len(after - before))
    size = len(before) + len(after)
    expected = 1 - 2 * len(before & after) / size if size else 0
    assert value == pytest.approx(expected, abs=1e-12)


def test_mean_score_is_the_mean_over_components_and_not_over_sites():
    scores = {"q": np.array([1.0, 2.0, 9.0]), "v": np.array([4.0]), "k": np.array([])}
    importance = {site: float(values.sum()) for site, values in scores.items()}
    ranks = {site: len(values) for site, values in scores.items()}
    assert mean_score(importance, ranks) == np.concatenate(list(scores.values())).mean()


def test_mean_score_without_components_is_zero():
    assert mean_score({"q": 0.0}, {"q": 0}) == 0


def test_importance_per_parameter_divides_by_what_the_site_costs():
    assert per_parameter({"q": 1.0, "v": 1.0}, {"v": 4, "q": 2}) == {"q": 0.5, "v": 0.25}
    assert not math.isnan(per_parameter({"q": 0.0}, {"q": 0})["q"])
