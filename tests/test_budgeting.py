import numpy as np
import pytest

from rankflow.budgeting import resolve_budget
from rankflow.errors import BudgetError
from rankflow.records import SiteInfo
from rankflow.specs.budget import BudgetSpec

# Costs of a component: 20, 12 and 30; of the magnitudes, where there are any: 8, 4 and 10.
SHAPES = {"layers.0.q_proj": (12, 8), "layers.0.v_proj": (8, 4), "layers.1.q_proj": (20, 10)}


def make_sites(spec, *, magnitude=False):
    sites = []
    for name, (columns, rows) in SHAPES.items():
        low, high = spec.bounds_of(name)
        largest = min(columns, rows)
        high = largest if high is None else min(high, largest)
        budgeted = magnitude and spec.magnitude == "budgeted"
        sites.append(SiteInfo(name, "linear", columns, rows, magnitude, low, high, budgeted))
    return sites


def resolve(*, magnitude=False, total_steps=100, base=1000, width=4, **keys):
    spec = BudgetSpec(**keys, magnitude="budgeted" if magnitude == "budgeted" else "always")
    return resolve_budget(
        spec,
        make_sites(spec, magnitude=bool(magnitude)),
        total_steps=total_steps,
        base_parameters=base,
        bytes_per_parameter=width,
    )


def cost(resolved):
    """Count the parameters of the start ranks by hand."""
    return sum(
        rank * (site.in_features + site.out_features) + site.has_magnitude * site.out_features
        for site, rank in zip(resolved.sites, resolved.start_ranks, strict=True)
    )


@pytest.mark.parametrize(
    ("keys", "parameters"),
    [
        ({"rank": 2}, 124),
        ({"rank": 0.5}, 31),
        ({"rank": 1.3}, 80),  # 80.6
        ({"params": 77}, 77),
        ({"fraction": 0.0999}, 99),
        ({"bytes": 402, "width": 4}, 100),
        ({"bytes": 402, "width": 2}, 201),
    ],
)
def test_every_target_becomes_whole_parameters_rounded_down(keys, parameters):
    assert resolve(**keys).target == parameters


@pytest.mark.parametrize("magnitude", [False, True])
def test_a_target_in_ranks_is_what_plain_lora_costs_with_or_without_magnitudes(magnitude):
    assert resolve(rank=2, magnitude=magnitude).target == 2 * (20 + 12 + 30)


def test_start_ranks_are_equal_where_the_target_is_a_whole_rank():
    assert resolve(rank=3).start_ranks.tolist() == [3, 3, 3]


def test_magnitudes_count_within_the_budget():
    resolved = resolve(rank=2, magnitude=True)
    # 124 - 22 = 102 parameters are left for components: one each, and 40 to spread.
    assert cost(resolved) <= 124
    assert sorted(resolved.start_ranks) in ([1, 2, 2], [1, 1, 2])
    assert cost(resolved) + 12 > 124


@pytest.mark.parametrize("rank", [0.5, 1, 1.7, 2.9, 3.9])
@pytest.mark.parametrize("magnitude", [False, True])
@pytest.mark.parametrize("policy", ["knapsack", "uniform", "random"])
def test_the_start_ranks_are_within_the_start_budget(rank, magnitude, policy):
    resolved = resolve(rank=rank, magnitude=magnitude, policy=policy)
    assert cost(resolved) <= resolved.start == resolved.target


def test_the_start_budget_is_a_factor_of_the_target():
    resolved = resolve(rank=2, start=1.5, schedule="cubic")
    assert (resolved.start, resolved.target) == (186, 124)
    assert resolved.start_ranks.tolist() == [3, 3, 3]
    assert [resolved.scheduler.budget_at(step) for step in (0, 70, 100)] == [186, 124, 124]


def test_a_growing_budget_starts_below_its_target():
    resolved = resolve(rank=2, start=0.5, schedule="linear")
    assert (resolved.start, resolved.target) == (62, 124)
    assert resolved.start_ranks.tolist() == [1, 1, 1]


def test_durations_become_steps():
    scheduler = resolve(
        rank=2, warmup=0.1, cooldown=30, every=0.2, total_steps=200, start=1.5, schedule="linear"
    ).scheduler
    assert scheduler.event_steps() == [20, 60, 100, 140, 170]


def test_bounds_shape_the_start_ranks():
    resolved = resolve(params=98, bounds={"q_proj": {"max_rank": 1}, "v_proj": {"min_rank": 4}})
    assert resolved.start_ranks.tolist() == [1, 4, 1]


@pytest.mark.parametrize(("policy", "static"), [("uniform", True), ("random", True)])
def test_a_blind_policy_under_a_constant_budget_needs_no_events(policy, static):
    assert resolve(rank=2, policy=policy).is_static is static


def test_a_frozen_pattern_needs_no_events():
    resolved = resolve(rank=2, policy="frozen", ranks={"q_proj": 1, "v_proj": 3})
    assert resolved.is_static
    assert resolved.start_ranks.tolist() == [1, 3, 1]


@pytest.mark.parametrize("keys", [{"policy": "knapsack"}, {"start": 1.5, "schedule": "linear"}])
def test_a_budget_that_moves_or_a_policy_that_looks_needs_events(keys):
    keys = {"policy": "uniform"} | keys
    assert not resolve(rank=2, **keys).is_static


def test_random_start_ranks_follow_the_seed():
    ranks = [resolve(rank=2, policy="random", seed=seed).start_ranks.tolist() for seed in (1, 1, 2)]
    assert ranks[0] == ranks[1] != ranks[2]


def test_a_budget_above_the_capacity_is_refused_with_the_feasible_range():
    # Full ranks 8, 4 and 10 cost 160 + 48 + 300.
    with pytest.raises(BudgetError, match=r"target budget of 509 .* at least 12 .* at most 508"):
        resolve(params=509)
    assert resolve(params=508).start_ranks.tolist() == [8, 4, 10]


def test_a_budget_below_the_minimum_ranks_is_refused_with_the_feasible_range():
    with pytest.raises(BudgetError, match=r"target budget of 61 .* 3 sites need at least 62 "):
        resolve(params=61, min_rank=1)
    assert resolve(params=62, min_rank=1).start_ranks.tolist() == [1, 1, 1]


def test_a_budget_below_the_magnitudes_is_refused():
    with pytest.raises(BudgetError, match="need at least 22 "):
        resolve(params=21, magnitude=True)
    assert resolve(params=22, magnitude=True).start_ranks.tolist() == [0, 0, 0]


def test_a_budget_for_not_even_one_component_is_refused():
    with pytest.raises(BudgetError, match="need at least 12 "):
        resolve(params=11)


def test_a_start_above_the_capacity_is_refused_though_its_target_fits():
    with pytest.raises(BudgetError, match=r"start budget of 750 .* at most 508"):
        resolve(params=500, start=1.5, schedule="linear")


def test_a_start_below_the_minimum_ranks_is_refused_though_its_target_fits():
    with pytest.raises(BudgetError, match=r"start budget of 40 .* at least 62"):
        resolve(params=80, start=0.5, schedule="linear", min_rank=1)


def test_large_numbers_are_written_with_separators():
    with pytest.raises(BudgetError, match="1,000,000 parameters"):
        resolve(params=1_000_000)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"bounds": {"o_proj": {"max_rank": 1}}}, r"'o_proj' in bounds matches none of the 3"),
        (
            {"policy": "frozen", "ranks": {"q_proj": 1, "v_proj": 1, "k": 2}},
            r"'k' in ranks matches none of the 3 sites; the first is 'layers.0.q_proj'",
        ),
        (
            {"policy": "frozen", "ranks": {"q_proj": 1}},
            r"frozen ranks say nothing of site 'layers.0.v_proj'",
        ),
        (
            {"policy": "frozen", "ranks": {"q_proj": 3, "v_proj": 3}},
            r"pattern costs 186 parameters, but the budget is 124",
        ),
        (
            {"policy": "frozen", "ranks": {"q_proj": 1, "v_proj": 5}},
            r"layers.0.v_proj rank 5, but it must lie between 0 and 4",
        ),
    ],
)
def test_a_pattern_that_does_not_fit_the_sites_is_refused(keys, message):
    with pytest.raises(BudgetError, match=message):
        resolve(rank=2, **keys)


def test_a_frozen_pattern_must_fit_the_budget_at_its_smallest():
    frozen = {"policy": "frozen", "ranks": {"q_proj": 3, "v_proj": 3}, "schedule": "linear"}
    with pytest.raises(BudgetError, match="pattern costs 186 parameters, but the budget is 124"):
        resolve(rank=2, start=1.5, **frozen)


def test_steps_that_leave_no_room_are_refused():
    with pytest.raises(BudgetError, match=r"warmup_steps=10 plus cooldown_steps=60 .*=50"):
        resolve(rank=2, warmup=10, cooldown=60, total_steps=50)


def test_the_sites_keep_their_order_and_bounds():
    resolved = resolve(rank=1, max_rank=6)
    assert [site.name for site in resolved.sites] == list(SHAPES)
    assert np.array_equal([site.max_rank for site in resolved.sites], [6, 4, 6])


@pytest.mark.parametrize("params", [4, 11, 22, 30, 80, 124])
@pytest.mark.parametrize("policy", ["knapsack", "uniform", "random"])
def test_budgeted_magnitudes_start_within_the_budget(policy, params):
    resolved = resolve(magnitude="budgeted", params=params, policy=policy)
    on = resolved.start_magnitudes
    assert on.shape == (3,)
    components = int(resolved.start_ranks @ np.array([20, 12, 30]))
    assert components + int(on @ np.array([8, 4, 10])) <= params
    assert (components > 0 or on.any()) or policy == "random"


def test_a_budget_of_one_budgeted_magnitude_is_the_least():
    with pytest.raises(BudgetError, match="need at least 4 "):
        resolve(magnitude="budgeted", params=3)
    # Full ranks cost 508, and the magnitudes 22.
    with pytest.raises(BudgetError, match="hold at most 530 "):
        resolve(magnitude="budgeted", params=531)
    full = resolve(magnitude="budgeted", params=530)
    assert full.start_ranks.tolist() == [8, 4, 10]
    assert full.start_magnitudes.all()


def test_bounds_are_of_ranks_and_not_of_magnitudes():
    with pytest.raises(BudgetError, match=r"'q_proj.magnitude' in bounds matches none of the 3"):
        resolve(magnitude="budgeted", rank=2, bounds={"q_proj.magnitude": {"max_rank": 0}})


def test_frozen_magnitudes_count_within_the_budget():
    frozen = {"policy": "frozen", "ranks": {"q_proj": 1, "v_proj": 1}}
    with pytest.raises(BudgetError, match="pattern costs 84 parameters, but the budget is 83"):
        resolve(magnitude="budgeted", params=83, **frozen)
    frozen["ranks"]["v_proj.magnitude"] = 0
    resolved = resolve(magnitude="budgeted", params=83, **frozen)
    assert resolved.start_ranks.tolist() == [1, 1, 1]
    assert resolved.start_magnitudes.tolist() == [True, False, True]
