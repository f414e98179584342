import math

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.statistics.interaction import interact
from rankflow.errors import RankFlowError

ROLES = {"both": "hybrid", "one_only": "dora", "other_only": "dynamic", "neither": "lora"}


def _scores(extra, noise=0.0, tasks=("x", "y")):
    """Magnitude takes 10% off, dynamic ranks 20%, together a further ``extra`` in logarithms."""
    rng = np.random.default_rng(0)
    effects = {"lora": 0, "dora": -0.1, "dynamic": -0.2, "hybrid": -0.3 + extra}
    return {
        method: {
            task: np.exp(t + effect + noise * rng.standard_normal(5)).tolist()
            for t, task in enumerate(tasks)
        }
        for method, effect in effects.items()
    }


def test_effects_that_multiply_do_not_interact_as_ratios(make_table):
    found = interact(make_table(_scores(extra=0), relative=True), **ROLES)
    assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0))
    plain = interact(make_table(_scores(extra=0)), **ROLES)
    assert plain.mean > 0.01  # (1 - 0.1) (1 - 0.2) is more than 1 - 0.1 - 0.2


def test_the_interaction_is_what_together_adds(make_table):
    found = interact(make_table(_scores(extra=-0.05, noise=0.01), relative=True), **ROLES)
    assert found.mean == pytest.approx(-0.05, abs=0.02)
    assert found.high < 0
    assert found.p == 2 / 2**10
    assert (found.n, found.tasks, found.broken) == (10, ("x", "y"), 0)
    assert found.d_z < -1


def test_it_is_the_t_interval_of_the_contrasts(make_table):
    scores = _scores(extra=0.1, noise=0.2, tasks=("x",))
    found = interact(make_table(scores), kind="student", **ROLES)
    lora, dora, dynamic, hybrid = (
        np.array(scores[m]["x"]) for m in ("lora", "dora", "dynamic", "hybrid")
    )
    contrasts = (hybrid - dora) - (dynamic - lora)
    expected = stats.ttest_1samp(contrasts, 0).confidence_interval()
    assert (found.low, found.high) == pytest.approx(tuple(expected))


def test_a_place_where_one_of_four_diverged_is_counted(make_table):
    scores = _scores(extra=0)
    scores["dynamic"]["x"][2] = math.nan
    found = interact(make_table(scores), **ROLES)
    assert (found.n, found.broken) == (9, 1)


def test_an_interaction_needs_four_methods(make_table):
    with pytest.raises(RankFlowError, match=r"four different methods, got .*'lora', 'lora'"):
        interact(make_table(_scores(0)), **{**ROLES, "other_only": "lora"})
    with pytest.raises(RankFlowError, match="mean 'dora'"):
        interact(make_table(_scores(0)), **{**ROLES, "one_only": "dorra"})
