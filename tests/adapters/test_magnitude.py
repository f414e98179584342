import copy
import io

import pytest
import torch
from torch import nn

from rankflow.adapters.dora import FastLinear, accelerate_dora
from rankflow.adapters.magnitude import empty_magnitude, neutral_magnitude
from rankflow.adapters.sites import find_sites


def turn_off(*sites):
    for site in sites:
        site.install(site.A, site.B, magnitude=nn.Parameter(empty_magnitude(site.magnitude)))


def turn_on(*sites):
    """Give every site the magnitude that changes nothing."""
    for site in sites:
        m = neutral_magnitude(site.layer, site.adapter_name, site.A, site.B)
        site.install(site.A, site.B, magnitude=nn.Parameter(m))


def set_rank(site, rank):
    A = 0.4 * torch.randn(rank, *site.A.shape[1:], dtype=site.A.dtype)
    B = 0.4 * torch.randn(len(site.B), rank, *site.B.shape[2:], dtype=site.B.dtype)
    site.install(nn.Parameter(A), nn.Parameter(B))


def copy_factors(source, target):
    """Give one site the base weight, the factors and the scale of another."""
    base = source.layer.get_base_layer().state_dict()
    target.layer.get_base_layer().load_state_dict(base)
    target.install(nn.Parameter(source.A.detach().clone()), nn.Parameter(source.B.detach().clone()))


@pytest.fixture(params=[3, 0], ids=["rank 3", "rank 0"])
def pair(request, layer_case, host, adapt):
    """A DoRA site whose magnitude is off, beside a plain LoRA site of the same weights."""
    off = adapt(host(layer_case), use_dora=True).double()
    plain = adapt(host(layer_case)).double()
    (site,), (twin,) = find_sites(off), find_sites(plain)
    set_rank(site, request.param)
    copy_factors(site, twin)
    turn_off(site)
    x = layer_case.inputs()
    return off, site, plain, twin, x.double() if x.is_floating_point() else x


# --- a site whose magnitude is off


def test_it_computes_as_plain_lora_with_the_same_gradients(pair):
    off, site, plain, twin, x = pair
    out, expected = off(x), plain(x)
    assert torch.equal(out, expected)
    if site.rank > 0:
        out.pow(2).sum().backward()
        expected.pow(2).sum().backward()
        assert site.B.grad.any()
        assert torch.equal(site.A.grad, twin.A.grad)
        assert torch.equal(site.B.grad, twin.B.grad)
    assert site.magnitude is None
    assert site.magnitude_slot.shape == (0,)
    assert site.magnitude_slot.grad is None
    assert site.parameters == twin.parameters


def test_its_gradient_reaches_the_input(pair, layer_case):
    off, _, plain, _, x = pair
    if not x.is_floating_point():
        pytest.skip("tokens have no gradient")
    gradients = []
    for model in (off, plain):
        leaf = x.clone().requires_grad_()
        model(leaf).pow(2).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_it_merges_and_unmerges_as_plain_lora(safe_merge, pair):
    off, site, plain, twin, x = pair
    before, weight = off(x), site.layer.get_base_layer().weight.detach().clone()
    off.merge_adapter(safe_merge=safe_merge)
    plain.merge_adapter(safe_merge=safe_merge)
    merged = site.layer.get_base_layer().weight
    assert torch.equal(merged, twin.layer.get_base_layer().weight)
    assert torch.equal(merged, weight) is (site.rank == 0)
    off.unmerge_adapter()
    torch.testing.assert_close(
        site.layer.get_base_layer().weight.detach(), weight, rtol=1e-13, atol=1e-13
    )
    torch.testing.assert_close(off(x), before, rtol=1e-12, atol=1e-12)


def test_merge_and_unload_leaves_a_plain_model_of_the_same_function(pair):
    off, _, _, _, x = pair
    before = off(x).detach()
    plain = off.merge_and_unload()
    assert not any("lora" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(plain(x).detach(), before, rtol=1e-12, atol=1e-12)


def test_it_is_disabled_like_any_other(pair):
    off, site, _, _, x = pair
    before = off(x)
    with off.disable_adapter():
        assert torch.equal(off(x), site.layer.get_base_layer()(x))
    assert torch.equal(off(x), before)


def test_copies_and_pickles_are_off_too_and_can_be_turned_on(pair):
    off, _, _, _, x = pair
    before = off(x)
    file = io.BytesIO()
    torch.save(off, file)
    file.seek(0)
    for twin in (copy.deepcopy(off), torch.load(file, weights_only=False)):
        (other,) = find_sites(twin)
        assert other.magnitude is None
        assert torch.equal(twin(x), before)
        turn_on(other)
        other.magnitude.data *= 2
        assert not torch.allclose(twin(x), before)
    assert torch.equal(off(x), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_follows_the_models_type(dtype, pair):
    off, site, plain, _, x = pair
    off.to(dtype)
    plain.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    assert torch.equal(off(x), plain(x))
    assert off(x).dtype == dtype
    turn_on(site)
    assert site.magnitude.dtype == dtype


def test_its_adapter_can_be_exchanged_and_added_to(mixed, adapt):
    model = mixed(use_dora=True)
    adapt(None, onto=model, adapter="other", target_modules=["first", "conv"], use_dora=True)
    tokens = torch.randint(11, (3, 4))
    sites = find_sites(model)
    plain = mixed()
    for site, twin in zip(sites, find_sites(plain), strict=True):
        copy_factors(site, twin)
    turn_off(*sites)
    expected = plain(tokens)
    assert torch.equal(model(tokens), expected)
    model.set_adapter("other")
    other = model(tokens)
    assert not torch.allclose(other, expected)
    model.set_adapter("default")
    assert torch.equal(model(tokens), expected)
    assert all(site.magnitude_slot.requires_grad for site in sites)
    model.base_model.set_adapter(["default", "other"])
    assert not torch.allclose(model(tokens), other)
    layer = sites[2].layer
    before = layer(torch.eye(5))
    layer.merge(adapter_names=["default", "other"])
    layer.unmerge()
    torch.testing.assert_close(layer(torch.eye(5)), before)
    model.set_adapter("other")
    model.delete_adapter("default")
    torch.testing.assert_close(model(tokens), other)


# --- on again


@pytest.mark.parametrize("rank", [3, 0])
def test_a_neutral_magnitude_is_the_dense_norm_in_pefts_own_shape(rank, layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True).double()
    (site,) = find_sites(model)
    shape = site.magnitude.shape
    set_rank(site, rank)
    turn_off(site)
    m = neutral_magnitude(site.layer, "default", site.A, site.B)
    assert m.shape == shape
    V = layer_case.matrix(site.layer.get_base_layer().weight.detach())
    V = V + site.scale * (site.B.flatten(1) @ site.A.flatten(1)).detach()
    torch.testing.assert_close(m.flatten(), V.norm(dim=1), rtol=1e-13, atol=0)


def test_turned_on_again_it_computes_the_same_and_as_dora(pair):
    off, site, _, _, x = pair
    before = off(x).detach()
    turn_on(site)
    torch.testing.assert_close(off(x), before, rtol=1e-13, atol=1e-13)
    off(x).pow(3).sum().backward()
    assert site.magnitude.grad.any()
    site.magnitude.data *= 2
    assert not torch.allclose(off(x), before)


@pytest.mark.parametrize("rank_first", [True, False])
def test_rank_and_magnitude_come_and_go_in_any_order(rank_first, layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True).double()
    (site,) = find_sites(model)
    kind = type(site.layer.lora_variant["default"])
    steps = [lambda: set_rank(site, 0), lambda: turn_off(site)]
    back = [lambda: set_rank(site, 2), lambda: turn_on(site)]
    for step in steps if rank_first else reversed(steps):
        step()
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x), base)
    for step in back if rank_first else reversed(back):
        step()
    assert type(site.layer.lora_variant["default"]) is kind
    assert (site.rank, site.magnitude is None) == (2, False)


def test_the_fast_forward_comes_back_with_the_magnitude(mixed):
    model = mixed(use_dora=True)
    accelerate_dora(model)
    site = find_sites(model)[2]
    fast = site.layer.lora_variant["default"]
    assert type(fast) is FastLinear
    turn_off(site)
    assert "default" not in site.layer.lora_variant
    set_rank(site, 0)
    turn_on(site)
    set_rank(site, 2)
    assert site.layer.lora_variant["default"] is fast


def test_a_site_that_was_off_when_the_model_was_accelerated_is_fast_once_it_is_on(mixed):
    model = mixed(use_dora=True)
    sites = find_sites(model)
    tokens = torch.randint(11, (3, 4))
    turn_off(sites[2], sites[3])
    set_rank(sites[3], 0)
    before = model(tokens)
    assert accelerate_dora(model) == 5
    torch.testing.assert_close(model(tokens), before)
    turn_on(sites[2], sites[3])
    set_rank(sites[3], 2)
    assert all(type(s.layer.lora_variant["default"]) is FastLinear for s in sites[2:4])
