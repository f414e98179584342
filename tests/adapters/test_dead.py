import copy
import io
import warnings

import peft
import pytest
import torch
from torch import nn

from rankflow.adapters import norm_cache
from rankflow.adapters.row_norms import measure_norms
from rankflow.adapters.sites import find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import sync_config


def kill(*sites):
    """Take all components away."""
    for site in sites:
        A = nn.Parameter(site.A.new_zeros((0, *site.A.shape[1:])))
        B = nn.Parameter(site.B.new_zeros((len(site.B), 0, *site.B.shape[2:])))
        site.install(A, B)


def revive(*sites, rank=2):
    """Give new components, none of them zero."""
    for site in sites:
        A = nn.Parameter(torch.randn(rank, *site.A.shape[1:], dtype=site.A.dtype))
        B = nn.Parameter(torch.randn(len(site.B), rank, *site.B.shape[2:], dtype=site.B.dtype))
        site.install(A, B)


def dense_weight(case, weight, magnitude, update=0.0):
    """The adapted weight in float64, written from the definition row by row."""
    W = case.matrix(weight.double()) + update
    if magnitude is not None:
        rows = [
            m / w.dot(w).sqrt() * w for m, w in zip(magnitude.double().flatten(), W, strict=True)
        ]
        W = torch.stack(rows)
    return case.weight_like(W, weight)


def dense_output(case, site, x, update=0.0):
    """What the site should put out, in float64."""
    base = site.layer.get_base_layer()
    magnitude = None if site.magnitude is None else site.magnitude.detach()
    weight = dense_weight(case, base.weight.detach(), magnitude, update)
    bias = getattr(base, "bias", None)
    x = x.double() if x.is_floating_point() else x
    return case.apply(base, x, weight, None if bias is None else bias.detach().double())


@pytest.fixture
def dead(layer_case, host, adapt, use_dora):
    """A model with one dead site, the site, and an input."""
    model = adapt(host(layer_case), use_dora=use_dora)
    (site,) = find_sites(model)
    translate_state_dicts(site.layer, "default")
    kill(site)
    return model, site, layer_case.inputs()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_dead_site_is_the_base_layer_with_its_rows_at_the_magnitudes_length(
    dtype, dead, layer_case
):
    model, site, x = dead
    model.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    out = model(x)
    assert out.dtype == dtype
    expected = dense_output(layer_case, site, x)
    # Two products and a norm after the base layer's own rounding.
    rtol = {torch.float32: 1e-5, torch.float64: 1e-13, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=rtol, atol=rtol)


def test_a_dead_site_without_a_magnitude_returns_the_base_output_itself(layer_case, host, adapt):
    model = adapt(host(layer_case))
    x = layer_case.inputs()
    kill(*find_sites(model))
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)


def test_a_dead_magnitude_learns_with_the_gradient_of_the_dense_formula(layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True).double()
    (site,) = find_sites(model)
    kill(site)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    model(x).square().sum().backward()

    base = site.layer.get_base_layer()
    magnitude = site.magnitude.detach().clone().requires_grad_()
    weight = dense_weight(layer_case, base.weight.detach(), magnitude)
    bias = getattr(base, "bias", None)
    layer_case.apply(base, x, weight, bias).square().sum().backward()
    assert magnitude.grad.abs().min() > 0
    torch.testing.assert_close(site.magnitude.grad, magnitude.grad, rtol=1e-12, atol=1e-12)


def test_gradients_flow_through_a_dead_site_to_its_input(layer_cases, host, adapt, use_dora):
    case = layer_cases["conv2d"]
    model = adapt(host(case), use_dora=use_dora).double()
    (site,) = find_sites(model)
    kill(site)
    x = case.inputs().double().requires_grad_()
    model(x).square().sum().backward()
    mine = x.grad.clone()
    x.grad = None
    base = site.layer.get_base_layer()
    weight = dense_weight(case, base.weight.detach(), site.magnitude)
    case.apply(base, x, weight.detach(), base.bias).square().sum().backward()
    torch.testing.assert_close(mine, x.grad, rtol=1e-12, atol=1e-12)


def test_a_row_of_zeros_stays_zero_through_forward_and_merging():
    base = nn.ModuleDict({"layer": nn.Linear(3, 2)})
    base["layer"].weight.data[0] = 0
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["layer"], use_dora=True))
    (site,) = find_sites(model)
    kill(site)
    layer = site.layer
    before = layer.get_base_layer().weight.detach().clone()
    x = torch.randn(4, 3)
    out = layer(x)
    assert torch.equal(out[:, 0], base["layer"].bias[0].expand(4))
    layer.merge()
    torch.testing.assert_close(layer(x), out)
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), before)


# --- merging


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_a_dead_site_changes_no_output_and_is_undone(safe_merge, dead):
    model, site, x = dead
    base = site.layer.get_base_layer()
    before, weight = model(x), base.weight.detach().clone()
    model.merge_adapter(safe_merge=safe_merge)
    assert site.layer.merged
    torch.testing.assert_close(model(x), before)
    if site.magnitude is not None:
        assert not torch.allclose(base.weight, weight)
    model.unmerge_adapter()
    torch.testing.assert_close(base.weight.detach(), weight)
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unload_leaves_a_plain_model_of_the_same_function(safe_merge, dead):
    model, _, x = dead
    before = model(x).detach()
    plain = model.merge_and_unload(safe_merge=safe_merge)
    assert not any("lora" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(plain(x).detach(), before)


def test_safe_merging_leaves_the_weight_that_it_was_given(dead):
    _, site, _ = dead
    weight = site.layer.get_base_layer().weight.detach()
    before = weight.clone()
    merged = site.layer.lora_variant["default"].merge_safe(site.layer, "default", weight)
    assert merged.data_ptr() != weight.data_ptr()
    assert torch.equal(weight, before)


def test_a_dead_adapter_is_disabled_like_any_other(dead, layer_case):
    model, site, x = dead
    base = site.layer.get_base_layer()
    before = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("order", [("default", "other"), ("other", "default")])
@pytest.mark.parametrize("other_dora", [False, True])
def test_a_dead_and_a_live_adapter_merge_together_and_come_apart_again(
    order, other_dora, layer_case, host, adapt, use_dora
):
    model = adapt(host(layer_case), use_dora=use_dora).double()
    adapt(None, onto=model, adapter="other", use_dora=other_dora)
    model.double()
    (site,) = find_sites(model, "default")
    (other,) = find_sites(model, "other")
    kill(site)
    base = site.layer.get_base_layer()
    W = layer_case.matrix(base.weight.detach().clone())
    update = (other.scale * other.B.flatten(1) @ other.A.flatten(1)).detach()
    # Each adapter's change is measured on the unmerged weight: a DoRA adapter multiplies the rows
    # of what it finds, by m over the norm of its own unmerged weight.
    expected = W
    for name in order:
        if name == "default":
            factor = 1.0
            if site.magnitude is not None:
                factor = (site.magnitude.flatten() / W.norm(dim=1)).detach()[:, None]
            expected = expected * factor
        else:
            factor = 1.0
            if other.magnitude is not None:
                factor = (other.magnitude.flatten() / (W + update).norm(dim=1)).detach()[:, None]
            expected = factor * (expected + update)
    site.layer.merge(adapter_names=list(order))
    merged = layer_case.matrix(base.weight.detach())
    torch.testing.assert_close(merged, expected, rtol=1e-11, atol=1e-11)
    site.layer.unmerge()
    torch.testing.assert_close(layer_case.matrix(base.weight.detach()), W, rtol=1e-11, atol=1e-11)


def test_two_dead_adapters_merge_together(layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True)
    adapt(None, onto=model, adapter="other", use_dora=True)
    sites = [*find_sites(model, "default"), *find_sites(model, "other")]
    kill(*sites)
    layer = sites[0].layer
    before = layer.get_base_layer().weight.detach().clone()
    W = layer_case.matrix(before)
    layer.merge(adapter_names=["default", "other"])
    ratios = [(s.magnitude.flatten() / W.norm(dim=1)).detach()[:, None] for s in sites]
    merged = layer_case.matrix(layer.get_base_layer().weight.detach())
    torch.testing.assert_close(merged, W * ratios[0] * ratios[1])
    layer.unmerge()
    torch.testing.assert_close(layer.get_base_layer().weight.detach(), before)


def test_two_active_adapters_add_up_when_one_is_dead(mixed, adapt):
    model = mixed()
    adapt(None, onto=model, adapter="other", target_modules=["first"])
    tokens = torch.randint(11, (3, 4))
    model.set_adapter("other")
    alone = model(tokens)
    kill(*find_sites(model, "default"))
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(model(tokens), alone)


# --- state dicts


def test_a_state_dict_goes_back_into_its_own_model_strictly(mixed, use_dora):
    model = mixed(use_dora=use_dora)
    sites = find_sites(model)
    for site in sites:
        translate_state_dicts(site.layer, "default")
    kill(sites[0], sites[2], sites[4])
    before = model(torch.arange(8).view(2, 4))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    for p in model.parameters():
        p.data += 1
    assert model.load_state_dict(state, strict=True) == ([], [])
    assert [site.rank for site in sites] == [0, 3, 0, 3, 0]
    assert torch.equal(model(torch.arange(8).view(2, 4)), before)


def test_a_dead_site_is_saved_as_nothing_or_as_one_component_of_zeros(dead, use_dora):
    model, site, _ = dead
    state = model.state_dict()
    factors = {k: v for k, v in state.items() if ".lora_" in k and "magnitude" not in k}
    if not use_dora:
        assert factors == {}
        return
    assert {tuple(v.shape) for v in factors.values()} == {
        (1, *site.A.shape[1:]),
        (site.B.shape[0], 1, *site.B.shape[2:]),
    }
    assert not any(v.any() for v in factors.values())


def test_a_live_site_is_saved_as_it_is(mixed):
    model = mixed()
    sites = find_sites(model)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    for site in sites:
        translate_state_dicts(site.layer, "default")
    state = model.state_dict()
    assert list(state) == list(plain)
    assert all(torch.equal(state[k], plain[k]) for k in plain)


def test_components_are_not_dropped_silently_into_a_dead_site(mixed):
    model = mixed()
    sites = find_sites(model)
    for site in sites:
        translate_state_dicts(site.layer, "default")
    state = {k: v.clone() for k, v in model.state_dict().items()}
    kill(*sites)
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict(state)


def test_the_other_adapters_tensors_are_left_alone(mixed, adapt):
    model = mixed()
    adapt(None, onto=model, adapter="other", target_modules=["first"])
    sites = find_sites(model, "default")
    for site in sites:
        translate_state_dicts(site.layer, "default")
    kill(*sites)
    state = model.state_dict()
    mine = [k for k in state if ".default" in k]
    others = [k for k in state if ".other" in k]
    assert mine == []
    assert len(others) == 2


def test_a_state_dict_can_be_taken_after_the_adapter_was_deleted(mixed, adapt):
    model = mixed()
    adapt(None, onto=model, adapter="other", target_modules=["first"])
    sites = find_sites(model, "default")
    for site in sites:
        translate_state_dicts(site.layer, "default")
    kill(*sites)
    model.set_adapter("other")
    model.delete_adapter("default")
    assert [k for k in model.state_dict() if ".default" in k] == []


# --- saved by PEFT, copied, pickled


def test_a_dead_dora_site_survives_saving_and_loading_by_stock_peft(
    layer_case, host, adapt, tmp_path
):
    model, x = adapt(host(layer_case), use_dora=True), layer_case.inputs()
    (site,) = find_sites(model)
    translate_state_dicts(site.layer, "default")
    kill(site)
    sync_config(model, "default", [site])
    before = model(x)
    model.save_pretrained(tmp_path)
    base = host(layer_case)
    base.block["layer"].load_state_dict(site.layer.get_base_layer().state_dict())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(x), before)


def test_mixed_ranks_survive_saving_and_loading_by_stock_peft(mixed, use_dora, tmp_path):
    model = mixed(use_dora=use_dora)
    sites = find_sites(model)
    for site in sites:
        translate_state_dicts(site.layer, "default")
    kill(sites[0], sites[3])
    revive(sites[1], rank=1)
    revive(sites[4], rank=5)
    sync_config(model, "default", sites)
    tokens = torch.randint(11, (3, 4))
    before = model(tokens)
    model.save_pretrained(tmp_path)
    base = copy.deepcopy(model).unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        loaded = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(loaded(tokens), before)
    ranks = {site.name: site.rank for site in find_sites(loaded)}
    dead = {"embed": 1, "second": 1} if use_dora else {}
    assert ranks == {"fan": 1, "first": 3, "conv": 5, **dead}


def test_a_transformer_with_dead_sites_survives_stock_peft(transformer, use_dora, tmp_path):
    base = transformer()
    state = copy.deepcopy(base.state_dict())
    config = peft.LoraConfig(
        target_modules="all-linear",
        use_dora=use_dora,
        init_lora_weights=False,
        fan_in_fan_out=base.config.model_type == "gpt2",
    )
    model = peft.get_peft_model(base, config).eval()
    sites = find_sites(model)
    for site in sites:
        translate_state_dicts(site.layer, "default")
        if use_dora:
            site.magnitude.data *= 1.5
    kill(*sites[::2])
    sync_config(model, "default", sites)
    tokens = torch.randint(1, 13, (2, 6))
    before = model(input_ids=tokens).logits
    model.save_pretrained(tmp_path)
    fresh = transformer()
    fresh.load_state_dict(state)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, before)


def test_a_copy_of_a_dead_site_lives_on_its_own(dead):
    model, site, x = dead
    before = model(x)
    twin = copy.deepcopy(model)
    (other,) = find_sites(twin)
    assert torch.equal(twin(x), before)
    twin.load_state_dict(twin.state_dict(), strict=True)
    revive(other)
    assert not torch.allclose(twin(x), before)
    assert torch.equal(model(x), before)
    assert site.rank == 0


def test_a_dead_site_can_be_pickled(dead):
    model, _, x = dead
    before = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), before)
    assert loaded.load_state_dict(loaded.state_dict(), strict=True) == ([], [])


def test_a_revived_site_computes_as_stock_peft_does(dead, layer_case):
    model, site, x = dead
    model.double()
    x = x.double() if x.is_floating_point() else x
    revive(site)
    update = (site.scale * site.B.flatten(1) @ site.A.flatten(1)).detach()
    expected = dense_output(layer_case, site, x, update)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_norm_of_a_dead_site_is_taken_once_for_each_base_weight(
    layer_case, host, adapt, monkeypatch
):
    model = adapt(host(layer_case), use_dora=True)
    (site,) = find_sites(model)
    kill(site)
    taken = []

    def measure(*args, **kwargs):
        taken.append(1)
        return measure_norms(*args, **kwargs)

    monkeypatch.setattr(norm_cache, "measure_norms", measure)
    optimizer = torch.optim.AdamW([site.magnitude], lr=0.1)
    x = layer_case.inputs()
    for _ in range(3):
        model(x).square().mean().backward()
        optimizer.step()
    assert len(taken) == 1
    with torch.no_grad():
        site.layer.get_base_layer().weight.mul_(torch.rand(1) + 0.5).add_(0.1)
    torch.testing.assert_close(
        model(x).double(), dense_output(layer_case, site, x), rtol=1e-5, atol=1e-5
    )
    assert len(taken) == 2
