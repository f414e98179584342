import itertools
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel

import rankflow as rf
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.methods.truncate import truncate
from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import find_sites
from rankflow.errors import BudgetError


def updates(model):
    """The dense update of every site in float64, by name."""
    return {
        site.name: site.scale * (site.B.flatten(1).double() @ site.A.flatten(1).double()).detach()
        for site in find_sites(model)
    }


def best_approximation(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


def magnitudes_of(sites):
    return sum(0 if site.magnitude is None else site.magnitude.numel() for site in sites)


@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_every_site_is_left_with_its_best_approximation(fraction, mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4)
    sites = find_sites(model)
    before, held = updates(model), magnitudes_of(sites)
    magnitudes = [s.magnitude.clone() for s in sites if s.magnitude is not None]
    budget = held + int(fraction * (sum(s.parameters for s in sites) - held))
    result = truncate(model, budget)
    for name, update in updates(model).items():
        expected = best_approximation(before[name], result.ranks[name])
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)
    kept = [s.magnitude for s in find_sites(model) if s.magnitude is not None]
    torch.testing.assert_close(kept, magnitudes, rtol=0, atol=0)
    assert result.parameters == sum(s.parameters for s in find_sites(model)) <= budget


def test_the_error_is_the_one_of_the_dropped_singular_values(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4)
    before = updates(model)
    sites = find_sites(model)
    result = truncate(model, (sum(s.parameters for s in sites) + magnitudes_of(sites)) // 2)
    after = updates(model)
    squares = [(before[n] - after[n]).square().sum() for n in before]
    whole = sum(update.square().sum() for update in before.values())
    assert result.error == pytest.approx(float((sum(squares) / whole).sqrt()), rel=1e-5)
    singular = {n: torch.linalg.svdvals(before[n]) for n in before}
    dropped = sum(singular[n][result.ranks[n] :].square().sum() for n in before)
    assert result.error == pytest.approx(float((dropped / whole).sqrt()), rel=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_no_other_ranks_within_the_budget_lose_less(seed, mixed, use_dora):
    torch.manual_seed(seed)
    # Sites of unlike strength, in their factors and in their scales.
    model = mixed(use_dora=use_dora, r=2, alpha_pattern={"first": 9, "conv": 1})
    sites = find_sites(model)
    for site in sites:
        site.B.data *= 3 * torch.rand(())
    energies = [torch.linalg.svdvals(update)[:2].square() for update in updates(model).values()]
    costs = [site.in_features + site.out_features for site in sites]
    held = magnitudes_of(sites)
    budget = held + int(2 * sum(costs) * torch.rand(()))
    least = min(
        sum(float(e[rank:].sum()) for e, rank in zip(energies, ranks, strict=True))
        for ranks in itertools.product(range(3), repeat=len(sites))
        if held + int(np.dot(costs, ranks)) <= budget
    )
    whole = sum(float(e.sum()) for e in energies)
    result = truncate(model, budget)
    assert result.parameters <= budget
    assert result.error**2 * whole == pytest.approx(least, rel=1e-5, abs=1e-8)


def test_peft_keeps_the_scale_and_knows_the_ranks(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4, lora_alpha=6, alpha_pattern={"first": 12})
    sites = find_sites(model)
    result = truncate(model, (sum(s.parameters for s in sites) + magnitudes_of(sites)) // 2)
    assert len(set(result.ranks.values())) > 1
    for site in find_sites(model):
        layer = site.layer
        scale = 3.0 if site.name == "first" else 1.5
        assert site.scale == scale
        assert layer.r["default"] == max(result.ranks[site.name], 1)
        assert layer.lora_alpha["default"] / layer.r["default"] == site.scale
        layer.set_scale("default", 1.0)
        assert site.scale == scale


def small_inputs():
    return torch.randint(12, (2, 4), generator=torch.Generator().manual_seed(3))


def test_a_truncated_adapter_saves_and_loads_in_stock_peft(mixed, use_dora, tmp_path):
    model = mixed(use_dora=use_dora, r=4).eval()
    base = mixed(use_dora=use_dora, r=4).unload()
    base.load_state_dict(model_base_weights(model))
    sites = find_sites(model)
    result = truncate(model, magnitudes_of(sites) + 60)
    assert 0 in result.ranks.values()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        model.save_pretrained(tmp_path)
        loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    torch.testing.assert_close(loaded(small_inputs()), model(small_inputs()), rtol=1e-5, atol=1e-6)


def model_base_weights(model):
    return {
        name.replace(".base_layer", ""): tensor
        for name, tensor in model.get_base_model().state_dict().items()
        if ".lora_" not in name
    }


def test_the_whole_budget_changes_no_output(mixed, use_dora):
    model = mixed(use_dora=use_dora).eval()
    expected = model(small_inputs()).detach()
    before = {site.name: site.rank for site in find_sites(model)}
    result = truncate(model, sum(site.parameters for site in find_sites(model)))
    assert result.ranks == before
    assert result.error == 0
    torch.testing.assert_close(model(small_inputs()), expected, rtol=1e-4, atol=1e-5)


def test_a_fast_dora_sees_the_new_factors(mixed):
    model = mixed(use_dora=True, r=4).eval()
    rf.accelerate_dora(model)
    model(small_inputs())  # norms are cached
    sites = find_sites(model)
    truncate(model, magnitudes_of(sites) + 60)
    site = next(s for s in find_sites(model) if s.name == "second")
    W = base_rows(site.layer).double()
    V = W + updates(model)["second"]
    x = torch.randn(3, 5)
    expected = x.double() @ (site.magnitude.double() / V.norm(dim=1))[:, None].mul(V).T
    torch.testing.assert_close(site.layer(x).double(), expected, rtol=1e-4, atol=1e-5)


def test_what_rankflow_trained_is_cut_at_the_end(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=4, trained=False)
    flow = rf.RankFlow(model, rf.load_budget("reallocate", rank=3, every=2), total_steps=20)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target = torch.randn(2, 16)
    for _ in range(20):
        (model(small_inputs())[:, :16] - target).square().mean().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        flow.step(optimizer)
    before = updates(model)
    result = truncate(model, flow.spent * 2 // 3)
    assert result.parameters == flow.spent <= flow.limit * 2 / 3
    for name, update in updates(model).items():
        expected = best_approximation(before[name], result.ranks[name])
        torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-5)


def test_a_rank_above_what_the_matrix_holds_costs_nothing_to_drop(mixed):
    model = mixed(r=7)  # the matrix of "second" has rank 4 at most
    before = updates(model)
    result = truncate(model, sum(site.parameters for site in find_sites(model)))
    assert result.ranks["second"] == 4
    assert result.error == pytest.approx(0, abs=1e-6)
    for name, update in updates(model).items():
        torch.testing.assert_close(update, before[name], rtol=1e-4, atol=1e-5)


def test_an_untrained_adapter_has_nothing_to_lose(mixed):
    model = mixed(trained=False)
    assert truncate(model, 30).error == 0


def test_magnitudes_that_cost_more_than_the_budget_are_refused(mixed):
    model = mixed(use_dora=True)
    with pytest.raises(BudgetError, match="a budget of 10 parameters is less than"):
        truncate(model, 10)


def test_gated_components_are_refused(mixed):
    model = mixed(trained=False)
    budget = rf.load_budget("reallocate", rank=2, components="gated")
    rf.RankFlow(model, budget, total_steps=20)
    with pytest.raises(UnsupportedError, match=r"gated components.*components = 'factors'"):
        truncate(model, 100)
