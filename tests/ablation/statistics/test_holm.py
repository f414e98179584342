import itertools

import numpy as np
import pytest

from rankflow.ablation.statistics.holm import holm
from rankflow.errors import RankFlowError


def _closed(p):
    """The closure of Bonferroni's test: the largest of it over all sets that hold a hypothesis."""
    indices = range(len(p))
    sets = [s for k in indices for s in itertools.combinations(indices, k + 1)]
    return [max(min(1, len(s) * min(p[i] for i in s)) for s in sets if j in s) for j in indices]


def test_an_example_worked_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04; the last is raised
    # to the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("m", range(1, 7))
def test_it_is_the_closed_test_of_bonferronis(m):
    rng = np.random.default_rng(m)
    for scale in (0.05, 1.0):
        p = rng.uniform(0, scale, m)
        assert holm(p) == pytest.approx(_closed(p))
    assert holm([0.03] * m) == pytest.approx([min(1, 0.03 * m)] * m)


def test_adjusted_p_values_keep_the_order_and_stay_below_1():
    p = np.random.default_rng(0).uniform(0, 1, 50)
    adjusted = holm(p)
    assert (np.diff(adjusted[np.argsort(p)]) >= 0).all()
    assert ((adjusted >= p) & (adjusted <= 1)).all()


def test_it_is_statsmodels():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(1).uniform(0, 0.2, 9)
    assert holm(p) == pytest.approx(multitest.multipletests(p, method="holm")[1])


def test_no_comparison_needs_no_correction():
    assert holm([]).shape == (0,)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_p_value_is_refused(p):
    with pytest.raises(RankFlowError, match="between 0 and 1, got"):
        holm([0.5, p])
