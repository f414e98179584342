import itertools
import warnings

import numpy as np
import peft
import pytest
import torch
from peft import PeftModel

import rankflow as rf
from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import Site, find_sites
from rankflow.errors import BudgetError, ExportError, SiteError, SpecError


def weights(model):
    """The base and the effective weight of every site, dense and in float64."""
    found = {}
    for site in find_sites(model):
        W = base_rows(site.layer).double()
        V = W + site.scale * (site.B.flatten(1).double() @ site.A.flatten(1).double()).detach()
        if site.magnitude is not None:
            m = site.magnitude.detach().double().flatten()
            V = (m / V.norm(dim=1)).unsqueeze(1) * V
        found[site.name] = (W, V)
    return found


def relative_error(before, after, names=None):
    names = before if names is None else names
    missing = sum(float((before[n][1] - after[n][1]).square().sum()) for n in names)
    change = sum(float((before[n][1] - before[n][0]).square().sum()) for n in names)
    return (missing / change) ** 0.5


def parameters_of(model):
    return sum(site.parameters for site in find_sites(model))


def magnitudes_of(model):
    return sum(s.magnitude.numel() for s in find_sites(model) if s.magnitude is not None)


def tokens():
    return torch.randint(12, (2, 4), generator=torch.Generator().manual_seed(3))


def part_of(model, fraction):
    held = magnitudes_of(model)
    return held + int(fraction * (parameters_of(model) - held))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9, 1.0])
def test_the_errors_are_those_of_the_dense_weights(fraction, mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4, alpha_pattern={"first": 12})
    before, ranks = weights(model), {site.name: site.rank for site in find_sites(model)}
    size, limit = parameters_of(model), part_of(model, fraction)
    result = rf.compress(model, limit)
    after = weights(model)
    assert result.ranks == {site.name: site.rank for site in find_sites(model)}
    assert result.ranks_before == ranks
    assert result.parameters == parameters_of(model) <= limit
    assert result.parameters_before == size
    assert set(result.magnitudes.values()) == {use_dora}
    assert result.error == pytest.approx(relative_error(before, after), rel=1e-4, abs=1e-6)
    for name, error in result.errors.items():
        expected = relative_error(before, after, [name])
        assert error == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_ranks_within_the_budget_err_less(seed, mixed):
    torch.manual_seed(seed)
    model = mixed(r=2, alpha_pattern={"first": 9, "conv": 1})
    energies, costs = [], []
    for site in find_sites(model):
        site.B.data *= 3 * torch.rand(())
        W, V = weights(model)[site.name]
        energies.append(torch.linalg.svdvals(V - W)[:2].square())
        costs.append(site.in_features + site.out_features)
    limit = int(2 * sum(costs) * (0.2 + 0.7 * torch.rand(())))
    least = min(
        sum(float(e[rank:].sum()) for e, rank in zip(energies, ranks, strict=True))
        for ranks in itertools.product(range(3), repeat=len(costs))
        if np.dot(costs, ranks) <= limit
    )
    whole = sum(float(e.sum()) for e in energies)
    assert rf.compress(model, limit).error ** 2 * whole == pytest.approx(least, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("error", [0.0, 0.05, 0.3, 0.9])
def test_an_error_gets_the_smallest_adapter_within_it(error, mixed):
    model = mixed(r=2)
    energies = [
        torch.linalg.svdvals(V - W)[:2].square().double() for W, V in weights(model).values()
    ]
    costs = [site.in_features + site.out_features for site in find_sites(model)]
    allowed = error**2 * sum(float(e.sum()) for e in energies)
    smallest = min(
        np.dot(costs, ranks)
        for ranks in itertools.product(range(3), repeat=len(costs))
        if sum(float(e[r:].sum()) for e, r in zip(energies, ranks, strict=True)) <= allowed + 1e-12
    )
    result = rf.compress(model, error=error)
    assert result.error <= error + 1e-12
    assert result.parameters == smallest


def test_an_error_is_kept_with_magnitudes_too(mixed):
    model = mixed(use_dora=True, r=4)
    before = weights(model)
    result = rf.compress(model, error=0.1)
    assert relative_error(before, weights(model)) <= 0.1 + 1e-6
    assert result.parameters < result.parameters_before


def test_the_curve_falls_to_zero_and_stays_below_uniform_ranks(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4)
    size = parameters_of(model)
    curve = rf.compress(model, part_of(model, 0.5)).curve
    assert [point.parameters for point in curve] == sorted(point.parameters for point in curve)
    assert curve[-1].parameters == size
    assert curve[-1].error == curve[-1].uniform_error == pytest.approx(0, abs=1e-7)
    errors = [point.error for point in curve]
    assert all(b <= a + 1e-3 for a, b in itertools.pairwise(errors))
    assert all(point.error <= point.uniform_error + 1e-3 for point in curve)
    assert sum(point.uniform_error - point.error for point in curve) > 0.1


@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_the_export_loads_in_stock_peft_with_the_outputs_in_memory(
    fraction, mixed, use_dora, tmp_path
):
    model = mixed(use_dora=use_dora, r=4, lora_alpha=6, use_rslora=True).eval()
    base = mixed().unload()
    own = model.state_dict()
    base.load_state_dict({name: own[_host_name(name, own)] for name in base.state_dict()})
    result = rf.compress(model, part_of(model, fraction))
    assert len(set(result.ranks.values())) > 1
    rf.export_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        loaded = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(tokens()), model(tokens()), rtol=1e-5, atol=1e-6)


def _host_name(name, own):
    module, _, leaf = name.rpartition(".")
    names = (f"base_model.model.{module}.base_layer.{leaf}", f"base_model.model.{name}")
    return next(name for name in names if name in own)


def test_the_whole_budget_changes_no_output(mixed, use_dora):
    model = mixed(use_dora=use_dora).eval()
    expected = model(tokens()).detach()
    assert rf.compress(model, parameters_of(model)).error == pytest.approx(0, abs=1e-7)
    torch.testing.assert_close(model(tokens()), expected, rtol=1e-4, atol=1e-5)


def test_scales_stay_and_peft_knows_the_ranks(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4, lora_alpha=6, alpha_pattern={"first": 12})
    result = rf.compress(model, part_of(model, 0.5))
    for site in find_sites(model):
        scale = 3.0 if site.name == "first" else 1.5
        assert site.scale == scale
        site.layer.set_scale("default", 1.0)
        assert site.scale == scale
        assert site.layer.r["default"] == max(result.ranks[site.name], 1)


def test_components_that_are_zero_go_before_anything_is_lost(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=3)
    for site in find_sites(model):
        site.B.data[:, 1] = 0
    result = rf.compress(model, parameters_of(model))
    assert set(result.ranks.values()) == {2}
    assert result.error == pytest.approx(0, abs=1e-7)


def test_sites_without_components_stay_dead_and_keep_their_magnitude(mixed):
    model = mixed(use_dora=True, r=2)
    rf.compress(model, magnitudes_of(model) + 60)
    dead = {site.name for site in find_sites(model) if site.rank == 0}
    assert dead
    expected = {s.name: s.magnitude.clone() for s in find_sites(model) if s.name in dead}
    before = weights(model)
    result = rf.compress(model, part_of(model, 0.6))
    for site in find_sites(model):
        if site.name in dead:
            assert site.rank == 0
            torch.testing.assert_close(site.magnitude, expected[site.name])
    assert result.error == pytest.approx(relative_error(before, weights(model)), rel=1e-4)


def test_bfloat16_adapters_are_compressed_in_float64_and_stay_bfloat16(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4)
    for site in find_sites(model):
        for parameter in site.named_parameters.values():
            parameter.data = parameter.data.bfloat16()
    before = weights(model)
    result = rf.compress(model, part_of(model, 0.5))
    assert {p.dtype for s in find_sites(model) for p in s.named_parameters.values()} == {
        torch.bfloat16
    }
    assert relative_error(before, weights(model)) == pytest.approx(result.error, abs=0.01)


@pytest.mark.parametrize("mode", ["never", "budgeted"])
def test_magnitudes_can_be_folded_away(mode, mixed):
    model = mixed(use_dora=True, r=4).eval()
    limit = magnitudes_of(model) - 1  # less than what keeping them costs
    before = weights(model)
    result = rf.compress(model, rf.load_budget("hybrid", params=limit, magnitude=mode))
    assert result.magnitudes == dict.fromkeys(result.ranks, False)
    assert result.error == pytest.approx(relative_error(before, weights(model)), rel=1e-4)
    assert parameters_of(model) == result.parameters <= limit


def test_a_budgeted_magnitude_is_treated_as_errs_less(mixed):
    errors = {}
    for mode in ("always", "never", "budgeted"):
        torch.manual_seed(1)
        model = mixed(use_dora=True, r=4)
        budget = rf.load_budget("reallocate", params=part_of(model, 0.5), magnitude=mode)
        errors[mode] = rf.compress(model, budget).error
    assert errors["budgeted"] == min(errors["always"], errors["never"])
    assert errors["always"] != errors["never"]


def test_bounds_of_a_budget_are_kept(mixed):
    model = mixed(r=4)
    bounds = {"first": {"min_rank": 3}, "embed": {"max_rank": 1}}
    ranks = rf.compress(model, rf.load_budget("reallocate", rank=2, bounds=bounds)).ranks
    assert ranks["first"] >= 3
    assert ranks["embed"] <= 1


def test_a_policy_that_prescribes_ranks_is_followed(mixed):
    ranks = rf.compress(mixed(r=4), rf.load_budget("fixed", rank=2)).ranks
    assert set(ranks.values()) == {2}
    frozen = {"embed": 1, "fan": 0, "first": 3, "second": 2, "conv": 1}
    budget = rf.load_budget("fixed", policy="frozen", ranks=frozen, rank=3)
    assert rf.compress(mixed(r=4), budget).ranks == frozen


def test_other_targets_are_resolved(mixed):
    model = mixed(r=4)
    size = parameters_of(model)
    result = rf.compress(model, rf.load_budget("reallocate", bytes=4 * (size // 2)))
    assert size // 3 < result.parameters <= size // 2


def test_two_compressions_are_the_same(mixed, use_dora):
    outcomes = []
    for _ in range(2):
        torch.manual_seed(5)
        model = mixed(use_dora=use_dora, r=4)
        outcomes.append((rf.compress(model, part_of(model, 0.4)), state_of(model)))
    (first, tensors), (second, others) = outcomes
    assert first == second
    torch.testing.assert_close(tensors, others, rtol=0, atol=0)


def test_the_ranks_found_start_a_new_run(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4)
    result = rf.compress(model, part_of(model, 0.2))
    assert 0 in result.ranks.values()
    new = mixed(use_dora=use_dora, r=4, trained=False)
    flow = rf.RankFlow(new, result.frozen_budget, total_steps=10)
    assert flow.ranks == result.ranks
    assert flow.spent == result.parameters
    live = [site for site, rank in result.ranks.items() if rank > 0]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        config = peft.LoraConfig(rank_pattern=result.rank_pattern, target_modules=live)
        stock = peft.get_peft_model(mixed().unload(), config)
    assert {s.name: s.rank for s in find_sites(stock)} == {s: result.ranks[s] for s in live}


def test_training_goes_on_from_what_is_left(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4)
    result = rf.compress(model, part_of(model, 0.5))
    before = weights(model)
    flow = rf.RankFlow(model, result.frozen_budget, total_steps=10)
    assert flow.ranks == result.ranks
    assert relative_error(before, weights(model)) == 0


def refused(model, *request, error, match, **options):
    """What is refused leaves the model as it was, bit for bit."""
    before = state_of(model)
    with pytest.raises(error, match=match):
        rf.compress(model, *request, **options)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_requests_that_cannot_be_met_are_refused_and_change_nothing(mixed):
    model = mixed(use_dora=True, r=4)
    size = parameters_of(model)
    refused(model, size + 1, error=BudgetError, match=f"is more than the {size:,} that the")
    refused(model, 3, error=BudgetError, match="a budget of 3 parameters is less than")
    refused(mixed(), 3, error=BudgetError, match="buys no component, and the cheapest costs")
    refused(model, error=SpecError, match="a budget or an error, and not both")
    budget = rf.load_budget("reallocate", rank=1, bounds={"nowhere": {"min_rank": 1}})
    refused(model, budget, error=BudgetError, match="'nowhere' in bounds matches none")


def test_a_budget_and_an_error_exclude_each_other(mixed):
    with pytest.raises(SpecError, match="a budget or an error, and not both"):
        rf.compress(mixed(), 100, error=0.1)
    with pytest.raises(SpecError, match="error = -1: a relative error is at least 0"):
        rf.compress(mixed(), error=-1)


def test_an_error_that_folding_cannot_reach_is_not_promised(mixed):
    model = mixed(use_dora=True, r=2)
    result = rf.compress(model, rf.load_budget("reallocate", rank=2, magnitude="never"))
    assert result.error > 0


def test_adapters_that_cannot_be_compressed_are_refused(mixed, adapt):
    refused(mixed(trained=False), 60, error=ExportError, match="changes no weight")
    gated = mixed(trained=False)
    rf.RankFlow(gated, rf.load_budget("reallocate", rank=2, components="gated"), total_steps=20)
    refused(gated, 60, error=ExportError, match="has gated components")
    merged = mixed()
    merged.merge_adapter()
    refused(merged, 60, error=ExportError, match="is merged into its base weight")
    with pytest.raises(SiteError, match="no adapter 'other'"):
        rf.compress(mixed(), 60, adapter_name="other")


def test_a_start_that_moved_the_base_weights_is_refused(mixed):
    model = mixed()
    model.peft_config["default"].init_lora_weights = "pissa"
    refused(model, 60, error=SiteError, match="init_lora_weights='pissa'")


def test_trained_biases_which_a_site_with_nothing_left_would_lose_are_refused(mixed):
    refused(mixed(bias="all"), 60, error=SiteError, match="bias='all'")


def test_a_failure_in_the_middle_leaves_everything_as_it_was(mixed, use_dora, monkeypatch):
    model = mixed(use_dora=use_dora, r=4)
    before, calls = state_of(model), []
    install = Site.install

    def fail_at_the_third(self, **parameters):
        calls.append(self)
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        install(self, **parameters)

    monkeypatch.setattr(Site, "install", fail_at_the_third)
    with pytest.raises(RuntimeError, match="out of memory"):
        rf.compress(model, part_of(model, 0.5))
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {site.rank for site in find_sites(model)} == {4}


def test_another_adapter_is_left_alone(mixed, adapt):
    model = mixed(r=4)
    adapt(None, adapter="other", onto=model, r=2, target_modules=["first", "conv"])
    before = {n: t for n, t in state_of(model).items() if ".default" in n}
    rf.compress(model, 40, adapter_name="other")
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
