"""How often verdicts and intervals are wrong, on tables whose truth is known.

A rate over ``n`` tables is held against the binomial 99% interval of what was promised.
"""

import itertools

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.statistics.intervals import bootstrap_interval, student_interval
from rankflow.ablation.statistics.paired import equivalence_p
from rankflow.ablation.statistics.table import ScoreTable
from rankflow.ablation.statistics.verdict import compare_all

METHODS = ("reference", "a", "b", "c", "d")
TASKS = ("x", "y", "z")
TABLES = 1_000

SHAPES = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape),
    "skew": lambda rng, shape: rng.lognormal(0, 0.6, shape) - np.exp(0.18),
    "unequal tasks": lambda rng, shape: rng.standard_normal(shape) * [[1.0], [2.0], [4.0]],
}


def _most(rate, tables):
    """The most errors that a true rate would give in 99% of all such simulations."""
    return stats.binom.ppf(0.995, tables, rate)


def _null_table(rng, seeds, noise):
    """Methods all alike on tasks of different scale, spread and level.

    A seed moves all methods on a task (its data order) and on all tasks (its initialisation).
    """
    shape = (len(METHODS), len(TASKS), seeds)
    logs = np.array([[-1.0], [0.0], [2.0]]) + rng.normal(0, 0.1, (len(TASKS), 1))
    logs = logs + rng.normal(0, 0.05, shape[1:]) + rng.normal(0, 0.05, (1, seeds))
    scores = np.exp(logs + np.array([[0.01], [0.02], [0.04]]) * noise(rng, shape))
    cells = itertools.product(METHODS, TASKS, range(seeds))
    return ScoreTable(
        dict(zip(cells, scores.ravel().tolist(), strict=True)), "test NLL", relative=True
    )


@pytest.mark.parametrize(
    ("seeds", "noise"),
    [
        (5, "normal"),
        pytest.param(5, "skew", marks=pytest.mark.slow),
        pytest.param(10, "normal", marks=pytest.mark.slow),
        pytest.param(10, "heavy tails", marks=pytest.mark.slow),
    ],
)
def test_methods_all_alike_are_rarely_told_apart(seeds, noise):
    rng = np.random.default_rng(seeds)
    declared = [(method, "reference") for method in METHODS[1:]]
    claimed = uncorrected = 0
    for _ in range(TABLES):
        table = _null_table(rng, seeds, SHAPES[noise])
        # Whatever the interval, it only takes claims away; Student's is fast.
        found = compare_all(table, declared, margin=1e-4, kind="student")
        claimed += any(c.outcome in ("better", "worse") for c in found)
        uncorrected += any(c.p <= 0.05 for c in found)
    print(f"{seeds} seeds, {noise}: {claimed} of {TABLES}, {uncorrected} without Holm")
    assert claimed <= _most(0.05, TABLES)
    assert uncorrected > _most(0.05, TABLES)  # so the simulation would show a missing correction


@pytest.mark.parametrize("seeds", [5, 10])
def test_a_real_difference_is_found(seeds):
    rng = np.random.default_rng(seeds)
    found = 0
    for _ in range(50):
        table = _null_table(rng, seeds, SHAPES["normal"])
        ahead = {c: v * (0.95 if c[0] == "a" else 1) for c, v in table.values.items()}
        declared = [(method, "reference") for method in METHODS[1:]]
        table = ScoreTable(ahead, "NLL", relative=True)
        clear = compare_all(table, declared, margin=1e-4, kind="student")[0]
        found += clear.outcome == "better"
    assert found >= 45


@pytest.mark.parametrize("seeds", [3, 10])
@pytest.mark.parametrize(("shape", "tasks"), [("normal", 1), ("normal", 3), ("unequal tasks", 3)])
def test_a_difference_of_the_margin_is_rarely_equivalent(make_pairs, tasks, seeds, shape):
    rng = np.random.default_rng(seeds)
    tables = 2_000
    noise = SHAPES[shape](rng, (tables, 3, seeds))[:, :tasks]
    for spread in (0.1, 1.0):
        values = 1 + spread * noise + (np.arange(tasks) - (tasks - 1) / 2)[:, None]
        claimed = sum(equivalence_p(make_pairs(*table), 1.0) <= 0.05 for table in values)
        assert claimed <= _most(0.05, tables)
    # Where the truth is 0 and the noise small, it is found.
    assert all(equivalence_p(make_pairs(*table), 1.0) <= 0.05 for table in 0.01 * noise[:100])


def _percentile(tasks, seed):
    """The stratified percentile bootstrap, which is not offered."""
    rng = np.random.default_rng(seed)
    means = [rng.choice(t, (1000, len(t))).mean(axis=1) for t in tasks]
    return np.quantile(np.mean(means, axis=0), [0.025, 0.975])


def _bca(tasks, seed):
    """The stratified bias-corrected and accelerated bootstrap, which is not offered.

    Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 14.
    """
    rng = np.random.default_rng(seed)
    means = np.mean([rng.choice(t, (1000, len(t))).mean(axis=1) for t in tasks], axis=0)
    middle = np.mean([t.mean() for t in tasks])
    influence = np.concatenate([t - t.mean() for t in tasks])
    bend = (influence**3).sum() / (6 * (influence**2).sum() ** 1.5)
    bias = stats.norm.ppf(((means < middle).mean() + (means <= middle).mean()) / 2)
    z = bias + stats.norm.ppf([0.025, 0.975])
    return np.quantile(means, stats.norm.cdf(bias + z / (1 - bend * z)))


def _coverage(interval_of, shape, tasks, seeds, tables):
    """The share of intervals that hold the truth, 0, in per cent."""
    rng = np.random.default_rng(seeds)
    noise = SHAPES[shape](rng, (tables, 3, seeds))[:, :tasks]
    values = noise + (np.arange(tasks) - (tasks - 1) / 2)[:, None]
    ends = np.array([interval_of(table, seed) for seed, table in enumerate(values)])
    return 100 * ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(("shape", "tasks"), [("normal", 1), ("normal", 3), ("unequal tasks", 3)])
def test_students_interval_covers_the_truth(make_pairs, shape, tasks, seeds):
    tables = 2_000
    share = _coverage(lambda t, _: student_interval(make_pairs(*t)), shape, tasks, seeds, tables)
    # One normal task is exact; Welch's freedoms are estimated, so three tasks may cover more.
    assert 100 - share <= 100 * _most(0.05, tables) / tables
    assert share <= 98


@pytest.mark.slow
def test_coverage_is_what_the_intervals_module_says(make_pairs):
    tables = 2_000
    kinds = {
        "percentile": _percentile,
        "BCa": _bca,
        "bootstrap": lambda t, s: bootstrap_interval(make_pairs(*t), seed=s, resamples=1000),
        "student": lambda t, _: student_interval(make_pairs(*t)),
    }
    cases = [(shape, 3) for shape in SHAPES] + [(shape, 1) for shape in list(SHAPES)[:3]]
    found = {
        (kind, seeds): [_coverage(of, *case, seeds, tables) for case in cases]
        for kind, of in kinds.items()
        for seeds in (3, 5, 10)
    }
    for key, shares in found.items():
        print(key, dict(zip(cases, shares, strict=True)))
    off = {
        kind: np.mean([np.abs(np.array(found[kind, seeds]) - 95) for seeds in (3, 5, 10)])
        for kind in kinds
    }
    print(off)
    assert max(*found["percentile", 5], *found["BCa", 5]) < 91
    assert min(found["student", 3] + found["student", 5] + found["student", 10]) > 88
    assert min(found["bootstrap", 5] + found["bootstrap", 10]) > 91
    assert off["student"] < 2
    assert off["bootstrap"] < 2
