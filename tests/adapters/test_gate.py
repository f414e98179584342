import copy
import pickle

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from rankflow.adapters.dora import accelerate_dora
from rankflow.adapters.gate import GatedVariant, effective_B, fold
from rankflow.adapters.gating import add_gates
from rankflow.adapters.sites import find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.errors import SiteError


def put_gates(model, adapter_name="default"):
    """Give every component a random gate, one of them 0."""
    sites = find_sites(model, adapter_name)
    add_gates(sites)
    for site in sites:
        site.gate.data = torch.randn_like(site.gate)
        site.gate.data[-1:] = 0
    return sites


def dense_weight(case, site, leaves=None):
    """The adapted weight in the layer's layout from the definition, in float64."""
    base = site.layer.get_base_layer()
    A, B, c = leaves or [p.detach().double() for p, _ in site.factors]
    V = case.matrix(base.weight.detach().double())
    for i in range(len(c)):
        V = V + site.scale * c[i] * torch.outer(B.flatten(1)[:, i], A.flatten(1)[i])
    if site.magnitude is not None:
        m = site.magnitude.detach().double().flatten()
        V = (m / V.detach().norm(dim=1))[:, None] * V  # the norm is held fixed, as in the paper
    return case.weight_like(V, base.weight)


def dense_output(case, site, x, leaves=None):
    base = site.layer.get_base_layer()
    bias = getattr(base, "bias", None)
    bias = None if bias is None else bias.detach().double()
    x = x.double() if x.is_floating_point() else x
    return case.apply(base, x, dense_weight(case, site, leaves), bias)


@pytest.fixture
def gated(layer_case, host, adapt, use_dora):
    """A float64 model with one gated site, the site, and an input."""
    model = adapt(host(layer_case), use_dora=use_dora).double()
    (site,) = put_gates(model)
    x = layer_case.inputs()
    return model, site, x.double() if x.is_floating_point() else x


# --- the function


def test_a_gate_of_one_changes_no_output(layer_case, host, adapt, use_dora):
    model = adapt(host(layer_case), use_dora=use_dora).double()
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    before = model(x)
    add_gates(find_sites(model))
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


def test_the_forward_is_the_dense_formula(gated, layer_case):
    model, site, x = gated
    torch.testing.assert_close(model(x), dense_output(layer_case, site, x), rtol=1e-11, atol=1e-11)


def test_gradients_are_those_of_the_dense_formula(gated, layer_case):
    model, site, x = gated
    model(x).pow(3).sum().backward()
    leaves = [p.detach().clone().requires_grad_() for p, _ in site.factors]
    dense_output(layer_case, site, x, leaves).pow(3).sum().backward()
    for (mine, _), reference in zip(site.factors, leaves, strict=True):
        assert reference.grad.abs().max() > 0
        torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("safe", [False, True])
def test_merging_folds_the_gate_and_unmerging_takes_it_out(safe, gated, layer_case):
    model, site, x = gated
    weight = site.layer.get_base_layer().weight
    before, factors = weight.detach().clone(), [p.detach().clone() for p, _ in site.factors]
    expected = dense_weight(layer_case, site)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(weight.detach(), expected, rtol=1e-11, atol=1e-11)
    model.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), before, rtol=1e-11, atol=1e-11)
    assert all(torch.equal(p, old) for (p, _), old in zip(site.factors, factors, strict=True))
    torch.testing.assert_close(model(x), dense_output(layer_case, site, x), rtol=1e-11, atol=1e-11)


def test_merging_on_top_of_another_adapter_folds_only_its_own_gate(
    layer_cases, host, adapt, use_dora
):
    case = layer_cases["linear"]
    model = adapt(host(case), use_dora=use_dora).double()
    adapt(None, adapter="other", onto=model.double(), use_dora=use_dora)
    model.double()
    put_gates(model)
    x = case.inputs().double()
    model.base_model.set_adapter(["other", "default"])
    weight = model.base_model.model.block["layer"].get_base_layer().weight
    before = weight.detach().clone()
    expected = model(x)
    model.merge_adapter()
    if not use_dora:  # DoRA's adapters do not commute with one another
        torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    model.unmerge_adapter()
    torch.testing.assert_close(weight.detach(), before, rtol=1e-11, atol=1e-11)


def test_an_embedding_that_scales_its_output_scales_the_gated_branch(use_dora):
    base = nn.ModuleDict({"layer": Gemma3TextScaledWordEmbedding(9, 4, 0, embed_scale=3.0)})
    config = peft.LoraConfig(r=2, target_modules=["layer"], use_dora=use_dora)
    model = peft.get_peft_model(base, config).double()
    x = torch.arange(1, 9)
    (site,) = find_sites(model)
    site.A.data, site.B.data = torch.randn_like(site.A), torch.randn_like(site.B)
    stock = copy.deepcopy(model)
    put_gates(model)
    find_sites(stock)[0].B.data = site.effective_B.detach()
    torch.testing.assert_close(site.layer(x), find_sites(stock)[0].layer(x), rtol=1e-11, atol=1e-11)


# --- the host


def test_a_gate_trains_with_its_adapter_and_no_other(layer_cases, host, adapt, use_dora):
    model = adapt(host(layer_cases["linear"]), use_dora=use_dora)
    adapt(None, adapter="other", onto=model)
    (site,) = put_gates(model)
    assert site.gate.requires_grad
    model.set_adapter("other")
    assert not site.gate.requires_grad
    model.set_adapter("default")
    assert site.gate.requires_grad
    model.set_adapter("other")
    model.delete_adapter("default")
    assert not any("lora_gate.default" in name for name, _ in model.named_parameters())
    model.load_state_dict(model.state_dict())


def test_an_adapter_made_anew_under_a_gated_one_s_name_is_folded_once(layer_cases, host, adapt):
    model = adapt(host(layer_cases["linear"]))
    adapt(None, adapter="other", onto=model)
    put_gates(model)
    model.set_adapter("other")
    model.delete_adapter("default")
    adapt(None, adapter="default", onto=model)
    (site,) = put_gates(model)
    saved = model.state_dict()["base_model.model.block.layer.lora_B.default.weight"]
    assert torch.equal(saved, site.effective_B)


def test_switching_the_adapter_off_gives_the_base_model(gated):
    model, site, x = gated
    with model.disable_adapter():
        assert torch.equal(model(x), site.layer.get_base_layer()(x))
    assert not torch.equal(model(x), site.layer.get_base_layer()(x))


def test_other_adapters_of_the_layer_go_on_as_they_were(layer_case, host, adapt, use_dora):
    model = adapt(host(layer_case))
    adapt(None, adapter="other", onto=model, use_dora=use_dora)
    x = layer_case.inputs()
    model.set_adapter("other")
    before = model(x)
    put_gates(model)
    assert torch.equal(model(x), before)
    saved = peft.get_peft_model_state_dict(model, adapter_name="other")
    assert saved
    assert not any("gate" in key for key in saved)


def test_copies_and_pickles_keep_the_gate(gated):
    model, _, x = gated
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), model(x))


def test_peft_does_not_convert_a_gated_adapter(layer_cases, host, adapt):
    model = adapt(host(layer_cases["linear"]))
    (site,) = put_gates(model)
    assert site.layer.supports_lora_conversion() is False


def test_accelerating_again_keeps_the_gates(gated, use_dora):
    model, site, x = gated
    before = model(x)
    if use_dora:
        accelerate_dora(model)
    else:
        with pytest.raises(SiteError, match="no DoRA site"):
            accelerate_dora(model)
    assert isinstance(site.layer.lora_variant["default"], GatedVariant)
    assert torch.equal(model(x), before)


def test_a_second_call_adds_nothing(gated):
    model, site, x = gated
    gate, before = site.gate, model(x)
    add_gates(find_sites(model))
    assert site.gate is gate
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("write", ["optimizer", "in place"])
def test_a_changed_gate_changes_the_norm(write, layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True).double()
    (site,) = put_gates(model)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    model(x)
    if write == "optimizer":
        site.gate.grad = torch.ones_like(site.gate)
        torch.optim.SGD([site.gate], lr=0.5).step()
    else:
        with torch.no_grad():
            site.gate.mul_(1.5)
    torch.testing.assert_close(model(x), dense_output(layer_case, site, x), rtol=1e-11, atol=1e-11)


# --- precision and memory


@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_low_precision_stays_near_the_formula(kind, layer_cases, host, adapt, use_dora):
    case = layer_cases[kind]
    model = adapt(host(case), use_dora=use_dora).bfloat16()
    (site,) = put_gates(model)
    x = case.inputs()
    out = model(x.bfloat16() if x.is_floating_point() else x)
    assert out.dtype == torch.bfloat16
    x = x.bfloat16() if x.is_floating_point() else x
    torch.testing.assert_close(out.double(), dense_output(case, site, x), rtol=5e-2, atol=5e-2)
    out.float().square().sum().backward()
    assert site.gate.grad.dtype == torch.bfloat16


def test_autocast_leaves_gate_and_gradients_in_float32(layer_cases, host, adapt, use_dora):
    case = layer_cases["linear"]
    model = adapt(host(case), use_dora=use_dora)
    (site,) = put_gates(model)
    x = case.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(x)
    torch.testing.assert_close(out.double(), dense_output(case, site, x), rtol=5e-2, atol=5e-2)
    out.float().square().sum().backward()
    assert site.gate.grad.dtype == torch.float32
    assert site.gate.grad[:-1].abs().min() > 0


def test_gradient_checkpointing_gives_the_same_gradients(gated):
    model, site, x = gated

    def gradients(run):
        model.zero_grad(set_to_none=True)
        run(x).square().sum().backward()
        return [p.grad.clone() for p, _ in site.factors]

    plain = gradients(model)
    checkpointed = gradients(lambda x: checkpoint(model, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


# --- state dicts


def stock_twin(model, layer_case, host, adapt, use_dora):
    torch.manual_seed(0)
    twin = adapt(host(layer_case), use_dora=use_dora).double()
    twin.base_model.model.block["layer"].base_layer.load_state_dict(
        model.base_model.model.block["layer"].base_layer.state_dict()
    )
    return twin


def test_a_state_dict_is_stock_and_holds_the_same_function(
    gated, layer_case, host, adapt, use_dora
):
    model, site, x = gated
    saved = peft.get_peft_model_state_dict(model)
    assert not any("gate" in key for key in [*saved, *model.state_dict()])
    twin = stock_twin(model, layer_case, host, adapt, use_dora)
    peft.set_peft_model_state_dict(twin, saved)
    torch.testing.assert_close(twin(x), model(x), rtol=1e-11, atol=1e-11)
    assert torch.equal(find_sites(twin)[0].B, site.effective_B)


def test_loading_its_own_state_dict_leaves_every_factor_bit_for_bit(gated):
    model, site, _ = gated
    before = [p.detach().clone() for p, _ in site.factors]
    model.load_state_dict(model.state_dict())  # strict: no key may be missing
    peft.set_peft_model_state_dict(model, peft.get_peft_model_state_dict(model))
    assert all(torch.equal(p, old) for (p, _), old in zip(site.factors, before, strict=True))


def test_loading_a_state_dict_into_another_gated_model_gives_its_function(gated):
    model, site, x = gated
    expected, saved = model(x).detach(), copy.deepcopy(model.state_dict())
    folded = site.effective_B.detach().clone()
    with torch.no_grad():
        for factor, _ in site.factors:
            factor.add_(torch.randn_like(factor))
    model.load_state_dict(saved)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert torch.equal(site.B, folded)
    assert torch.equal(site.gate, torch.ones_like(site.gate))


def test_a_state_dict_of_other_parts_leaves_the_gate(gated):
    model, site, _ = gated
    before = site.gate.detach().clone()
    model.load_state_dict({}, strict=False)
    assert torch.equal(site.gate, before)


# --- rank 0


@pytest.fixture
def dead(gated):
    model, site, x = gated
    A, B, gate = (p.detach() for p, _ in site.factors)
    site.install(nn.Parameter(A[:0]), nn.Parameter(B[:, :0]), gate=nn.Parameter(gate[:0]))
    return model, site, x


def test_a_dead_gated_site_is_the_base_layer_at_the_magnitudes_length(dead, layer_case):
    model, site, x = dead
    torch.testing.assert_close(model(x), dense_output(layer_case, site, x), rtol=1e-11, atol=1e-11)
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), dense_output(layer_case, site, x), rtol=1e-11, atol=1e-11)


def test_a_dead_gated_site_has_a_stock_state_dict_and_loads_it_again(dead, use_dora):
    model, site, x = dead
    translate_state_dicts(site.layer, "default")
    before = model(x).detach()
    saved = model.state_dict()
    assert not any("gate" in key for key in saved)
    assert sum(".lora_" in key for key in saved) == (3 if use_dora else 0)
    model.load_state_dict(saved)
    assert site.rank == len(site.gate) == 0
    assert torch.equal(model(x), before)


def test_a_revived_gated_site_is_gated_again(dead, layer_case):
    model, site, x = dead
    A = torch.randn(2, *site.A.shape[1:]).double()
    B = torch.randn(len(site.B), 2, *site.B.shape[2:]).double()
    site.install(
        nn.Parameter(A), nn.Parameter(B), gate=nn.Parameter(torch.tensor([0.5, 2.0]).double())
    )
    torch.testing.assert_close(model(x), dense_output(layer_case, site, x), rtol=1e-11, atol=1e-11)


# --- the site's view


def test_a_gated_site_counts_its_gates_and_shows_its_factors(gated):
    model, site, _ = gated
    info = site.describe()
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert info.has_gate
    assert info.component_cost == info.plain_cost + 1
    assert site.parameters == trainable == info.fixed_cost + site.rank * info.component_cost
    assert [axis for _, axis in site.factors] == [0, 1, 0]
    assert all(p.shape[axis] == site.rank for p, axis in site.factors)
    assert torch.equal(site.effective_B, fold(site.B, site.gate))


def test_without_a_gate_the_effective_factor_is_the_stored_one(layer_cases, host, adapt):
    (site,) = find_sites(adapt(host(layer_cases["conv2d"])))
    assert site.gate is None
    assert effective_B(site.layer, "default") is site.B
    assert len(site.factors) == 2
