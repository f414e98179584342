"""The 0/1 knapsack: take the items of greatest total value whose total weight fits.

    maximise  sum_j v_j x_j   subject to  sum_j w_j x_j <= C,   x_j in {0, 1}

Taking items by falling density ``v_j / w_j`` until one no longer fits solves the relaxation
``0 <= x_j <= 1``; the density of that item is the price ``lambda`` of a unit of weight, and

    U = lambda C + sum_j max(0, v_j - lambda w_j)

bounds every solution from above. Deciding item j against its sign of ``v_j - lambda w_j`` costs at
least ``|v_j - lambda w_j|``, so only items near the break matter. `solve_greedy` decides the
nearest items of each weight (the core) anew by dynamic programming over Pareto-optimal states,
which is exact for small problems and leaves a known, tiny gap on large ones. `solve_exact` hands
every item whose decision could still pay to a branch-and-bound solver.

Dantzig, Discrete-variable extremum problems, 1957. Pisinger, A minimal algorithm for the 0-1
knapsack problem, 1997.
"""

from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rankflow.errors import RankFlowError
from rankflow.records import BoolArray, FloatArray, IntArray

# A state's decisions are the bits of an int64, so the core can hold at most 63 items.
_CORE_ITEMS = 48
_MAX_STATES = 4096
# HiGHS stops at an absolute gap of 1e-6: values of this size make that 1e-10 of an item.
_SOLVER_VALUE = 1e4


@dataclass(frozen=True, slots=True)
class Selection:
    """Which items are taken, and how good that is at least.

    Attributes:
        taken: Whether each item is taken, shape ``(N,)``.
        value: Total value of the taken items.
        upper_bound: A proven bound on the value of every selection that fits; equal to ``value``
            if this selection is proven optimal.
    """

    taken: BoolArray
    value: float
    upper_bound: float


@dataclass(frozen=True, slots=True)
class _Relaxation:
    order: IntArray  # items by falling density
    breaks: int  # place of the break in this order
    taken: BoolArray  # the items before the break
    gain: FloatArray  # v - lambda w
    price: float  # lambda
    bound: float  # U


def take_in_order(order: IntArray, weights: IntArray, capacity: int) -> IntArray:
    """Go through the items in the given order and take each that still fits.

    Args:
        order: Indices of the items on offer, shape ``(n,)``.
        weights: Weights of all items, shape ``(N,)``.
        capacity: Weight that may be taken in all.

    Returns:
        Indices of the items taken.

    >>> take_in_order(np.array([2, 1, 0]), np.array([1, 4, 3]), 4)
    array([2, 0])
    """
    taken: list[IntArray] = []
    while True:
        order = order[weights[order] <= capacity]
        if not order.size:
            return np.concatenate([*taken, order])
        paid = np.cumsum(weights[order])
        fitting = int(np.searchsorted(paid, capacity, side="right"))
        taken.append(order[:fitting])
        capacity -= int(paid[fitting - 1])
        order = order[fitting:]


def count_before(groups: IntArray) -> IntArray:
    """How many earlier entries are of the same group as each entry, shape ``(N,)``.

    >>> count_before(np.array([0, 2, 0, 0, 2]))
    array([0, 0, 1, 2, 1])
    """
    by_group = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    before = np.empty(len(groups), dtype=np.int64)
    before[by_group] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return before


def solve_greedy(values: FloatArray, weights: IntArray, capacity: int) -> Selection:
    """Solve by density, then decide the items around the break anew.

    Args:
        values: Value of each item, at least 0, shape ``(N,)``.
        weights: Weight of each item, at least 1, shape ``(N,)``.
        capacity: Weight that may be taken in all, at least 0.

    Returns:
        A selection with a proven bound; equally dense items are taken in the order given.

    >>> solve_greedy(np.array([6.0, 5.0, 5.0]), np.array([3, 2, 2]), 4).taken
    array([False,  True,  True])
    """
    weights, capacity = _in_common_units(weights, capacity)
    relaxed = _relax(values, weights, capacity)
    taken = np.zeros(len(values), dtype=np.bool_)
    taken[take_in_order(relaxed.order, weights, capacity)] = True
    value = float(values[taken].sum())
    if value >= relaxed.bound:
        return Selection(taken, value, value)
    core = _choose_core(weights, relaxed)
    refined, complete = _decide_core(values, weights, capacity, relaxed, core, value)
    bound = relaxed.bound
    if complete:  # a better selection would have to decide an item outside the core differently
        bound -= float(np.abs(np.delete(relaxed.gain, core)).min(initial=np.inf))
    refined_value = float(values[refined].sum())
    if refined_value > value:
        taken, value = refined, refined_value
    return Selection(taken, value, max(value, bound))


def solve_exact(values: FloatArray, weights: IntArray, capacity: int) -> Selection:
    """Solve to the optimum, by branch and bound over the items that `solve_greedy` leaves open.

    Args:
        values: Value of each item, at least 0, shape ``(N,)``.
        weights: Weight of each item, at least 1, shape ``(N,)``.
        capacity: Weight that may be taken in all, at least 0.

    Returns:
        An optimal selection, to 1e-10 of an item's value.

    Raises:
        RankFlowError: If the solver fails, which no valid problem makes it do.

    >>> solve_exact(np.array([6.0, 5.0, 5.0]), np.array([3, 2, 2]), 4).value
    10.0
    """
    start = solve_greedy(values, weights, capacity)
    if start.value == start.upper_bound:
        return start
    weights, capacity = _in_common_units(weights, capacity)
    relaxed = _relax(values, weights, capacity)
    undecided = np.flatnonzero(np.abs(relaxed.gain) <= relaxed.bound - start.value)
    taken = _branch_and_bound(values, weights, capacity, relaxed, undecided)
    value = float(values[taken].sum())
    if value < start.value:
        return Selection(start.taken, start.value, start.value)
    return Selection(taken, value, value)


def _in_common_units(weights: IntArray, capacity: int) -> tuple[IntArray, int]:
    """Divide by the greatest common divisor; rounding the capacity down tightens the bound."""
    unit = max(1, int(np.gcd.reduce(weights)))
    return weights // unit, capacity // unit


def _relax(values: FloatArray, weights: IntArray, capacity: int) -> _Relaxation:
    density = values / weights
    order = np.argsort(-density, kind="stable")
    breaks = int(np.searchsorted(np.cumsum(weights[order]), capacity, side="right"))
    taken = np.zeros(len(values), dtype=np.bool_)
    taken[order[:breaks]] = True
    price = float(density[order[breaks]]) if breaks < len(order) else 0.0
    gain = values - price * weights
    bound = price * capacity + float(np.maximum(gain, 0).sum())
    return _Relaxation(order, breaks, taken, gain, price, bound)


def _choose_core(weights: IntArray, relaxed: _Relaxation) -> IntArray:
    """Find the items nearest the break, all weights in turn, from the farthest to the nearest.

    Items of one weight alone could not use a capacity that is no multiple of it.
    """
    from_break = np.abs(np.arange(len(weights)) - relaxed.breaks)
    nearest = relaxed.order[np.argsort(from_break, kind="stable")]
    nearest = nearest[np.argsort(np.abs(relaxed.gain[nearest]), kind="stable")]
    kind = np.unique(weights[nearest], return_inverse=True)[1]
    core = nearest[np.argsort(count_before(kind), kind="stable")[:_CORE_ITEMS]]
    return core[np.argsort(-np.abs(relaxed.gain[core]), kind="stable")]


def _decide_core(
    values: FloatArray,
    weights: IntArray,
    capacity: int,
    relaxed: _Relaxation,
    core: IntArray,
    value: float,
) -> tuple[BoolArray, bool]:
    """Decide the core anew, the rest as relaxed; also say whether every state was followed."""
    taken = relaxed.taken.copy()
    taken[core] = False
    spare = capacity - int(weights[taken].sum())
    needed = value - float(values[taken].sum())
    bits, complete = _best_subset(values[core], weights[core], spare, relaxed.price, needed)
    taken[core] = (bits >> np.arange(len(core))) & 1 == 1
    spare = capacity - int(weights[taken].sum())
    taken[take_in_order(relaxed.order[~taken[relaxed.order]], weights, spare)] = True
    return taken, complete


def _best_subset(
    values: FloatArray, weights: IntArray, capacity: int, price: float, needed: float
) -> tuple[int, bool]:
    """Find the best subset as bits (0 if none is worth more than ``needed``).

    A state is one subset of the items seen so far. It is dropped if another is at least as light
    and as valuable, or if even the relaxation of the items to come cannot lift it over ``needed``.
    """
    gain = np.maximum(values - price * weights, 0)
    gain_to_come = gain.sum() - np.cumsum(gain)
    weight, value, bits = np.zeros(1, np.int64), np.zeros(1), np.zeros(1, np.int64)
    complete = True
    for i in range(len(values)):
        weight = np.concatenate([weight, weight + weights[i]])
        value = np.concatenate([value, value + values[i]])
        bits = np.concatenate([bits, bits | 1 << i])
        reach = value + price * (capacity - weight) + gain_to_come[i]
        alive = np.flatnonzero((weight <= capacity) & (reach > needed))
        if alive.size > _MAX_STATES:
            complete = False
            alive = alive[np.argsort(-reach[alive], kind="stable")[:_MAX_STATES]]
        alive = alive[np.lexsort((-value[alive], weight[alive]))]
        best_lighter = np.maximum.accumulate(np.append(-1.0, value[alive][:-1]))
        alive = alive[value[alive] > best_lighter]
        weight, value, bits = weight[alive], value[alive], bits[alive]
    return int(bits[-1]) if bits.size else 0, complete


def _branch_and_bound(
    values: FloatArray,
    weights: IntArray,
    capacity: int,
    relaxed: _Relaxation,
    undecided: IntArray,
) -> BoolArray:
    """Decide the given items, the rest as relaxed; equal items are one integer variable."""
    taken = relaxed.taken.copy()
    taken[undecided] = False
    spare = capacity - int(weights[taken].sum())
    items = np.stack([values[undecided], weights[undecided]])
    kinds, kind, counts = np.unique(items, axis=1, return_inverse=True, return_counts=True)
    result = milp(
        c=-kinds[0] * (_SOLVER_VALUE / kinds[0].max()),
        constraints=LinearConstraint(kinds[1:], ub=spare),
        integrality=np.ones(len(counts), dtype=np.int64),
        bounds=Bounds(0, counts),
        options={"mip_rel_gap": 0.0},
    )
    if result.x is None:
        raise RankFlowError(f"the exact knapsack failed ({result.message}); use the greedy one")
    taken[undecided] = count_before(kind) < np.rint(result.x)[kind]
    if int(weights[taken].sum()) > capacity:
        raise RankFlowError("the exact knapsack overshot by rounding; use the greedy one")
    return taken
