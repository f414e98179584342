import itertools

import numpy as np
import pytest
import torch

from rankflow.allocation import knapsack
from rankflow.allocation.policies import allocate_knapsack
from rankflow.errors import BudgetError
from rankflow.export.decompose import AdaptedMatrix, Decomposition, decompose
from rankflow.export.select import choose, smallest, tabulate
from rankflow.records import SiteInfo

SHAPES = ((3, 5), (4, 4), (6, 2))


def draw(seed, *, most=None):
    """Three DoRA sites without magnitudes of their own, or with as many components as they can."""
    generator = torch.Generator().manual_seed(seed)
    infos, parts = [], []
    for i, (out, width) in enumerate(SHAPES):
        A = torch.randn(2, width, generator=generator, dtype=torch.float64)
        B = torch.randn(out, 2, generator=generator, dtype=torch.float64)
        W = torch.randn(out, width, generator=generator, dtype=torch.float64)
        m = 0.5 + torch.rand(out, generator=generator, dtype=torch.float64)
        matrix = AdaptedMatrix(f"s{i}", A, B, 1.0, m)
        parts.append(decompose(matrix, W, most=min(out, width) if most is None else most))
        infos.append(SiteInfo(f"s{i}", "linear", width, out, False, 0, min(out, width)))
    return tabulate(infos, parts, [part.energies for part in parts])


def all_ranks(candidates):
    for ranks in itertools.product(*(range(site.max_rank + 1) for site in candidates.sites)):
        if sum(ranks) > 0:
            yield ranks


def left_out(candidates, ranks):
    pairs = zip(candidates.parts, ranks, strict=True)
    missing = sum(part.beyond + float(part.energies[rank:].sum()) for part, rank in pairs)
    return (missing / candidates.change) ** 0.5


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("error", [0.05, 0.3, 0.7])
def test_no_ranks_meet_the_error_with_fewer_parameters(seed, error):
    candidates = draw(seed)
    ranks = [len(kept) for kept in smallest(candidates, error)]
    assert left_out(candidates, ranks) <= error
    meeting = (r for r in all_ranks(candidates) if left_out(candidates, r) <= error)
    assert candidates.cost(ranks) == min(map(candidates.cost, meeting))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("budget", [8, 17, 40, 1000])
def test_no_ranks_within_the_budget_leave_less_out(seed, budget):
    candidates = draw(seed)
    ranks = [len(kept) for kept in choose(candidates, budget, None)]
    assert candidates.cost(ranks) <= budget
    within = (r for r in all_ranks(candidates) if candidates.cost(r) <= budget)
    best = min(left_out(candidates, r) for r in within)
    assert left_out(candidates, ranks) == pytest.approx(best, abs=1e-9)


def test_a_cap_limits_what_a_site_may_get_and_what_can_be_reached():
    capped = draw(0, most=1)
    assert [len(kept) for kept in choose(capped, 1000, None)] == [1, 1, 1]
    reach = left_out(capped, (1, 1, 1))
    assert reach > 0.1
    with pytest.raises(BudgetError, match="is out of reach"):
        smallest(capped, reach / 2)
    assert capped.error(smallest(capped, reach + 1e-9)) == pytest.approx(reach)


def test_the_greatest_components_of_a_site_stay():
    candidates = draw(3)
    for kept in choose(candidates, 40, None):
        assert list(kept) == list(np.arange(len(kept)))


def test_an_adapter_of_many_components_is_solved_at_once_and_short_of_less_than_one(monkeypatch):
    generator = np.random.default_rng(0)
    sites, scores = [], []
    for i in range(60):
        out, width = generator.integers(100, 1000, 2)
        sites.append(SiteInfo(f"s{i}", "linear", int(width), int(out), False, 0, 100))
        scores.append(np.sort(generator.exponential(size=100))[::-1].copy())
    empty = torch.zeros(0)
    parts = [Decomposition(empty, empty, s, float(s.sum()), 0.0, None) for s in scores]
    candidates = tabulate(sites, parts, scores)
    limit = sum(50 * site.plain_cost for site in sites)
    monkeypatch.setattr(knapsack, "milp", None)  # branch and bound would fail
    keep = choose(candidates, limit, None)
    best = allocate_knapsack(candidates.table, limit).upper_bound
    found = sum(score[kept].sum() for score, kept in zip(scores, keep, strict=True))
    assert best - found < 1e-5 * best
