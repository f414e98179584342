from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.allocation import knapsack
from rankflow.allocation.knapsack import solve_exact, solve_greedy, take_in_order
from rankflow.errors import RankFlowError

SOLVERS = [solve_greedy, solve_exact]


def best_by_enumeration(values, weights, capacity):
    """The value of the best of all 2^N subsets."""
    subsets = np.array(list(product([0, 1], repeat=len(values))))
    return (subsets @ values)[subsets @ weights <= capacity].max()


def best_by_capacity(values, weights, capacity):
    """Bellman's recursion over every capacity, for weights too many to enumerate."""
    best = np.zeros(capacity + 1)
    for value, weight in zip(values, weights, strict=True):
        best[weight:] = np.maximum(best[weight:], best[: len(best) - weight] + value)
    return best[-1]


@st.composite
def problems(draw, most_items=9):
    count = draw(st.integers(0, most_items))
    few_values = st.sampled_from([0.0, 1.0, 1.0, 2.5])
    value = st.one_of(few_values, st.floats(0, 100))
    values = draw(st.lists(value, min_size=count, max_size=count))
    weight = st.one_of(st.sampled_from([6, 15, 24]), st.integers(1, 40))
    weights = draw(st.lists(weight, min_size=count, max_size=count))
    capacity = draw(st.integers(0, sum(weights) + 1))
    return np.array(values, dtype=float), np.array(weights, dtype=np.int64), capacity


def check_selection(selection, values, weights, capacity):
    assert weights[selection.taken].sum() <= capacity
    assert selection.value == pytest.approx(values[selection.taken].sum())
    assert selection.upper_bound >= selection.value


@pytest.mark.parametrize("solve", SOLVERS)
@settings(deadline=None)
@given(problem=problems())
def test_a_small_problem_is_solved_to_the_optimum_and_proven(solve, problem):
    selection = solve(*problem)
    check_selection(selection, *problem)
    optimum = best_by_enumeration(*problem)
    assert selection.value == pytest.approx(optimum)
    assert selection.upper_bound == pytest.approx(optimum)


@pytest.mark.parametrize(("core", "states"), [(1, 1), (2, 4), (3, 8), (7, 2), (7, 3)])
def test_the_bound_holds_when_core_and_states_are_cut_short(monkeypatch, core, states):
    monkeypatch.setattr(knapsack, "_CORE_ITEMS", core)
    monkeypatch.setattr(knapsack, "_MAX_STATES", states)
    missed = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        values, weights = rng.uniform(1, 2, 9), rng.integers(10, 20, 9)
        problem = values, weights, int(weights.sum() * rng.uniform(0.2, 0.8))
        greedy, exact = solve_greedy(*problem), solve_exact(*problem)
        check_selection(greedy, *problem)
        check_selection(exact, *problem)
        optimum = best_by_enumeration(*problem)
        missed += greedy.value < optimum - 1e-9
        assert greedy.upper_bound >= optimum - 1e-9
        assert exact.value == pytest.approx(optimum, rel=1e-12)
    assert missed > 0  # else the cut was too mild to test the bound


@pytest.mark.parametrize("solve", SOLVERS)
def test_many_equal_items_of_few_kinds_are_solved(solve):
    weights = np.repeat([7, 11, 13], 60)
    for values in (np.ones(180), weights.astype(float), np.repeat([3.0, 5.0, 5.5], 60)):
        for capacity in (100, 333, 707, 1200):
            selection = solve(values, weights, capacity)
            check_selection(selection, values, weights, capacity)
            optimum = best_by_capacity(values, weights, capacity)
            assert selection.value == pytest.approx(optimum)
            assert selection.upper_bound >= optimum - 1e-9


@pytest.mark.parametrize("seed", range(10))
def test_a_large_problem_is_solved_to_the_optimum(seed):
    rng = np.random.default_rng(seed)
    values, weights = rng.lognormal(0, 1.5, 400), rng.integers(20, 120, 400)
    capacity = int(weights.sum() * rng.uniform(0.2, 0.8))
    optimum = best_by_capacity(values, weights, capacity)
    greedy, exact = (solve(values, weights, capacity) for solve in SOLVERS)
    assert exact.value == pytest.approx(optimum, rel=1e-12)
    assert optimum * 0.999 <= greedy.value <= optimum * (1 + 1e-12)
    assert optimum * (1 - 1e-12) <= greedy.upper_bound <= optimum * 1.001


def test_the_core_corrects_the_choice_that_density_alone_gets_wrong():
    values, weights = np.array([6.0, 5.0, 5.0]), np.array([3, 2, 2])
    by_density = solve_greedy(values, weights, 3)
    assert by_density.taken.tolist() == [True, False, False]
    assert solve_greedy(values, weights, 4).taken.tolist() == [False, True, True]


def test_equally_dense_items_are_taken_in_the_order_given():
    taken = solve_greedy(np.full(6, 2.0), np.full(6, 5), 17).taken
    assert taken.tolist() == [True, True, True, False, False, False]


def test_worthless_items_use_what_capacity_is_left():
    assert solve_greedy(np.array([0.0, 1.0, 0.0]), np.array([4, 4, 4]), 9).taken.sum() == 2


@settings(deadline=None)
@given(problem=problems(most_items=20), order=st.randoms(use_true_random=False))
def test_taking_in_order_skips_only_what_no_longer_fits(problem, order):
    _, weights, capacity = problem
    offered = list(range(len(weights)))
    order.shuffle(offered)
    expected, spare = [], capacity
    for item in offered:
        if weights[item] <= spare:
            expected.append(item)
            spare -= weights[item]
    assert take_in_order(np.array(offered, dtype=np.int64), weights, capacity).tolist() == expected


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"failed \(no luck\); use the greedy one"),
        (9.0, "overshot by rounding; use the greedy"),
    ],
)
def test_a_solver_without_a_valid_answer_is_not_trusted(monkeypatch, answer, message):
    def fail(c, **_):
        return SimpleNamespace(x=answer and np.full(len(c), answer), message="no luck")

    monkeypatch.setattr(knapsack, "_CORE_ITEMS", 1)
    monkeypatch.setattr(knapsack, "milp", fail)
    rng = np.random.default_rng(0)
    values, weights = rng.uniform(1, 2, 20), rng.integers(20, 40, 20)
    with pytest.raises(RankFlowError, match=message):
        solve_exact(values, weights, int(weights.sum()) // 2)
