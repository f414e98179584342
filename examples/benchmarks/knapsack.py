"""How fast and how exact the knapsack policy is: `python examples/benchmarks/knapsack.py`.

The optimum of the random tables comes from scipy's branch-and-bound solver, run on the whole
problem and not on what the greedy policy leaves open. (The solver prints a line of its own now and
then.)
"""

import time
from statistics import median

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp

from rankflow.allocation.policies import KnapsackResult, allocate_knapsack
from rankflow.records import ComponentTable, SiteInfo

SHAPES = [(384, 384), (768, 768), (768, 3072), (2304, 768), (4096, 1024), (4096, 14336)]
SCORES = {
    "lognormal": lambda rng, size: rng.lognormal(0, 1.5, size),
    "exponential": lambda rng, size: rng.exponential(1, size),
    "equal": lambda rng, size: np.ones(size),
}


def draw_table(rng: np.random.Generator, ranks: np.ndarray, scores: str) -> ComponentTable:
    shapes = [SHAPES[i] for i in rng.integers(len(SHAPES), size=len(ranks))]
    sites = tuple(
        SiteInfo(f"site{i}", "linear", *shape, bool(rng.integers(2)), min_rank=0, max_rank=64)
        for i, shape in enumerate(shapes)
    )
    components = int(ranks.sum())
    return ComponentTable(
        sites=sites,
        ranks=ranks,
        scores=SCORES[scores](rng, components),
        ages=np.zeros(components, dtype=np.int64),
        demand=np.zeros(len(ranks)),
    )


def draw_limit(rng: np.random.Generator, table: ComponentTable) -> int:
    components = table.cost_of(table.ranks) - table.fixed_cost
    return table.fixed_cost + int(components * rng.uniform(0.2, 0.8))


def solve_whole(table: ComponentTable, limit: int) -> float:
    """The optimum, from one binary variable for each component."""
    costs, capacity = table.component_costs[table.site_index], limit - table.fixed_cost
    unit = np.gcd.reduce(costs)
    result = milp(
        c=-1e4 * table.scores,  # HiGHS stops at an absolute gap of 1e-6
        constraints=LinearConstraint(costs[None, :] // unit, ub=capacity // unit),
        integrality=np.ones(len(costs), dtype=np.int64),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 0.0},
    )
    return float(table.scores @ np.rint(result.x))


def time_large_tables(repeats: int = 5) -> None:
    print(f"10,000 sites x 32 components, median of {repeats}")
    print(f"{'scores':<12}{'greedy s':>10}{'exact s':>10}{'greedy gap at most':>20}")
    for scores in SCORES:
        rng = np.random.default_rng(0)
        table = draw_table(rng, np.full(10_000, 32), scores)
        limit = draw_limit(rng, table)
        seconds: dict[bool, float] = {}
        results: dict[bool, KnapsackResult] = {}
        for exact in (False, True):
            runs = []
            for _ in range(repeats):
                started = time.perf_counter()
                results[exact] = allocate_knapsack(table, limit, exact=exact)
                runs.append(time.perf_counter() - started)
            seconds[exact] = median(runs)
        gap = results[False].upper_bound / results[False].value - 1
        print(f"{scores:<12}{seconds[False]:>10.3f}{seconds[True]:>10.3f}{gap:>20.1e}")


def compare_small_tables(count: int = 200) -> None:
    print(f"\n{count} random tables of 3-12 sites with ranks 1-16, against the optimum")
    print(f"{'policy':<12}{'worst gap':>12}{'median gap':>12}{'proven optimal':>16}")
    gaps: dict[bool, list[float]] = {False: [], True: []}
    proven = {False: 0, True: 0}
    for seed in range(count):
        rng = np.random.default_rng(seed)
        ranks = rng.integers(1, 17, rng.integers(3, 13))
        table = draw_table(rng, ranks, "lognormal" if seed % 2 else "exponential")
        limit = draw_limit(rng, table)
        optimum = solve_whole(table, limit)
        for exact in (False, True):
            result = allocate_knapsack(table, limit, exact=exact)
            gaps[exact].append(1 - result.value / optimum)
            proven[exact] += result.upper_bound == result.value
    for exact, name in ((False, "greedy"), (True, "exact")):
        worst, middle = max(gaps[exact]), median(gaps[exact])
        print(f"{name:<12}{worst:>12.1e}{middle:>12.1e}{proven[exact]:>12}/{count}")


if __name__ == "__main__":
    time_large_tables()
    compare_small_tables()
