import numpy as np
import pytest
from scipy import stats

from rankflow.analysis import correlation
from rankflow.analysis.correlation import RESAMPLES, correlate


def clusters(layers=8, points=4, *, slope=1.0, within=0.1, seed=0):
    """Points whose layers lie around a line, and that lie close around their layers."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=layers)
    names = np.repeat([f"layer {i}" for i in range(layers)], points)
    x = np.repeat(centres, points) + within * random.normal(size=len(names))
    y = slope * np.repeat(centres, points) + within * random.normal(size=len(names))
    return x, y, names


@pytest.mark.parametrize("has_ties", [False, True])
def test_the_correlations_are_scipys(has_ties):
    x, y, layers = clusters(within=2.0)
    if has_ties:
        x, y = x.round(), y.round()
    found = correlate(x, y, layers)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert found.spearman.value == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert (found.points, found.layers, found.reason) == (32, 8, "")


@pytest.mark.parametrize("has_ties", [False, True])
def test_the_intervals_are_those_of_layers_really_repeated(has_ties, monkeypatch):
    monkeypatch.setattr(correlation, "RESAMPLES", 60)
    x, y, layers = clusters(within=1.0)
    if has_ties:
        x, y = x.round(), y.round()
    found = correlate(x, y, layers, seed=3)
    names = np.unique(layers)
    draws = np.random.default_rng(3).multinomial(8, [1 / 8] * 8, size=60)
    values = []
    for times in draws:
        drawn = np.concatenate(
            [
                np.flatnonzero(layers == n)
                for n, t in zip(names, times, strict=True)
                for _ in range(t)
            ]
        )
        values.append(
            (stats.pearsonr(x[drawn], y[drawn])[0], stats.spearmanr(x[drawn], y[drawn])[0])
        )
    low, high = np.quantile(values, [0.025, 0.975], axis=0)
    assert (found.pearson.low, found.spearman.low) == pytest.approx(tuple(low))
    assert (found.pearson.high, found.spearman.high) == pytest.approx(tuple(high))


def test_the_same_seed_gives_the_same_intervals():
    data = clusters(within=1.0)
    assert correlate(*data, seed=1) == correlate(*data, seed=1)
    assert correlate(*data, seed=1) != correlate(*data, seed=2)


@pytest.mark.parametrize("slope", [-1.0, 1.0])
def test_a_planted_relation_is_found(slope):
    found = correlate(*clusters(slope=slope))
    for estimate in (found.pearson, found.spearman):
        assert estimate.low <= estimate.value <= estimate.high
        assert slope * estimate.value > 0.9
        assert min(slope * estimate.low, slope * estimate.high) > 0.5


def test_points_of_one_layer_do_not_narrow_the_interval():
    """Each layer seen forty times over is no more evidence than seen four times."""
    widths = []
    for points in (4, 40):
        x, y, layers = clusters(points=points, slope=0.5, within=0.01)
        y = y + np.repeat(np.random.default_rng(5).normal(size=8), points)
        estimate = correlate(x, y, layers).pearson
        widths.append(estimate.high - estimate.low)
    assert widths[1] == pytest.approx(widths[0], rel=0.05)
    assert widths[1] > 0.5


@pytest.mark.parametrize("noise", [0.0, 1e-13])
def test_a_constant_change_has_no_correlation(noise):
    x, y, layers = clusters()
    y = 0.01 * (1 + noise * y)
    for found in (correlate(x, y, layers), correlate(y, x, layers)):
        assert (found.pearson, found.spearman) == (None, None)
        assert found.reason == "dD or dM is constant"


def test_zeros_alone_have_no_correlation():
    assert correlate([0.0] * 3, [0.0] * 3, "abc").reason == "dD or dM is constant"


@pytest.mark.parametrize("count", [0, 1, 2])
def test_fewer_than_three_points_have_no_correlation(count):
    found = correlate([1.0, 2.0][:count], [2.0, 1.0][:count], ["a", "b"][:count])
    assert (found.pearson, found.spearman, found.points) == (None, None, count)
    assert found.reason == "fewer than 3 points"


def test_fewer_than_three_layers_have_no_interval():
    x, y, layers = clusters(layers=2)
    found = correlate(x, y, layers)
    assert found.pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    assert (found.pearson.low, found.spearman.high) == (None, None)


def test_draws_in_which_nothing_varies_are_not_counted():
    """Two layers of three are constant, so that a third of the draws has no correlation."""
    x, y = [1.0, 1.0, 1.0, 1.0, 2.0, 3.0], [5.0, 5.0, 5.0, 5.0, 1.0, 9.0]
    estimate = correlate(x, y, "aabbcc").pearson
    assert np.isfinite([estimate.low, estimate.high]).all()
    assert RESAMPLES >= 1000
