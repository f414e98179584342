import copy

import peft
import pytest
import torch
from torch import nn

from rankflow.adapters.gate import fold
from rankflow.adapters.gating import convert
from rankflow.adapters.sites import find_sites
from rankflow.adapters.vera import draw_matrices, draw_unused, share_matrices, start_vectors

RANK, SEED = 5, 7
SIZES = {"first": (6, 8), "second": (8, 10), "third": (10, 4)}  # in, out


class Net(nn.Module):
    """Three linear layers of different shapes."""

    def __init__(self):
        super().__init__()
        for name, (rows, columns) in SIZES.items():
            self.add_module(name, nn.Linear(rows, columns))

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def put_vectors(model, rank=RANK):
    """Turn an adapter into VeRA of one rank at every site, with random vectors."""
    sites = find_sites(model)
    convert(sites, "vera")
    share_matrices(sites, draw_matrices(sites, rank, SEED))
    start_vectors(sites)
    for site in sites:
        site.gate.data.normal_()
        site.row_gate.data.normal_()
    return sites


@pytest.fixture
def vera(use_dora):
    """A float64 model of VeRA, or with magnitudes of DVoRA, and its sites."""
    config = {"r": RANK, "lora_alpha": RANK, "target_modules": list(SIZES), "use_dora": use_dora}
    model = peft.get_peft_model(Net(), peft.LoraConfig(**config)).double()
    return model, put_vectors(model)


@pytest.fixture
def x():
    return torch.randn(4, 6, dtype=torch.float64)


def test_forward_and_gradients_are_those_of_pefts_vera(x):
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=list(SIZES))
    model = peft.get_peft_model(Net(), config).double()
    sites = put_vectors(model)
    base = Net().double()
    base.load_state_dict(dict(zip(base.state_dict(), base_weights(model), strict=True)))
    config = peft.VeraConfig(r=RANK, projection_prng_key=SEED, target_modules=list(SIZES))
    reference = peft.get_peft_model(base, config).double()
    layers = {name: getattr(reference.base_model.model, name) for name in SIZES}
    for site in sites:
        layers[site.name].vera_lambda_d["default"].data = site.gate.detach().clone()
        layers[site.name].vera_lambda_b["default"].data = site.row_gate.detach().clone()
    torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
    model(x).pow(2).sum().backward()
    reference(x).pow(2).sum().backward()
    for site in sites:
        theirs = layers[site.name]
        d, b = theirs.vera_lambda_d["default"].grad, theirs.vera_lambda_b["default"].grad
        torch.testing.assert_close(site.gate.grad, d, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(site.row_gate.grad, b, rtol=1e-10, atol=1e-12)
        assert site.A.grad is None
        assert site.B.grad is None


def base_weights(model):
    return [
        getattr(model.base_model.model, name).base_layer.state_dict()[kind]
        for name in SIZES
        for kind in ("weight", "bias")
    ]


def dense_output(model, sites, x, leaves):
    """The network from the definition; leaves are (d, b) of every site."""
    for site, (d, b) in zip(sites, leaves, strict=True):
        base = site.layer.get_base_layer()
        update = torch.diag(b) @ site.B.detach() @ torch.diag(d) @ site.A.detach()
        V = base.weight.detach() + site.scale * update
        if site.magnitude is not None:
            V = (site.magnitude.detach() / V.detach().norm(dim=1))[:, None] * V
        x = x @ V.T + base.bias.detach()
        x = x if site.name == "third" else torch.tanh(x)
    return x


def test_forward_and_gradients_are_those_of_the_dense_formula_with_magnitudes_too(vera, x):
    model, sites = vera
    leaves = [tuple(p.detach().clone().requires_grad_() for p in s.trained) for s in sites]
    expected = dense_output(model, sites, x, leaves)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    model(x).pow(2).sum().backward()
    expected.pow(2).sum().backward()
    for site, pair in zip(sites, leaves, strict=True):
        for mine, reference in zip(site.trained, pair, strict=True):
            torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-9, atol=1e-11)


def test_every_kind_of_layer_can_host_it(layer_case, host, adapt, use_dora):
    model = adapt(host(layer_case), use_dora=use_dora).double()
    (site,) = put_vectors(model, rank=4)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    base = site.layer.get_base_layer()
    update = site.row_gate.detach()[:, None] * site.B.detach().flatten(1) * site.gate.detach()
    V = layer_case.matrix(base.weight.detach()) + site.scale * update @ site.A.detach().flatten(1)
    if use_dora:
        V = (site.magnitude.detach().flatten() / V.norm(dim=1))[:, None] * V
    weight = layer_case.weight_like(V, base.weight)
    bias = getattr(base, "bias", None)
    expected = layer_case.apply(base, x, weight, None if bias is None else bias.detach())
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_a_changed_vector_changes_the_norm(vera, x):
    model, sites = vera
    model(x)
    with torch.no_grad():
        for site in sites:
            site.row_gate.mul_(1.5)
    leaves = [tuple(p.detach() for p in site.trained) for site in sites]
    torch.testing.assert_close(model(x), dense_output(model, sites, x, leaves), rtol=1e-11, atol=0)


def test_a_site_trains_its_vectors_alone_and_counts_them(vera, use_dora):
    model, sites = vera
    for site in sites:
        info = site.describe()
        assert info.component_cost == 1
        assert info.fixed_cost == site.out_features * (2 if use_dora else 1)
        assert site.parameters == info.fixed_cost + site.rank
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sum(site.parameters for site in sites)


def test_switching_adapters_leaves_the_matrices_frozen(vera):
    model, sites = vera
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=list(SIZES)))
    for name in ("other", "default"):
        model.set_adapter(name)
        for site in sites:
            assert not site.A.requires_grad
            assert not site.B.requires_grad
            assert all(p.requires_grad == (name == "default") for p in site.trained)
    model.base_model.disable_adapter_layers()
    model.base_model.enable_adapter_layers()
    assert not any(site.A.requires_grad or site.B.requires_grad for site in sites)


def test_sites_use_the_leading_part_of_the_same_matrices(vera):
    _, sites = vera
    matrices = draw_matrices(sites, RANK, SEED)
    assert matrices.A.shape == (RANK, 10)
    assert matrices.B.shape == (10, RANK)
    for site in sites:
        assert torch.equal(site.A, matrices.A[:, : site.in_features].double())
        assert torch.equal(site.B, matrices.B[: site.out_features].double())


def test_newborns_are_components_that_the_site_does_not_have():
    config = peft.LoraConfig(r=2, target_modules=list(SIZES))
    sites = find_sites(peft.get_peft_model(Net(), config))
    convert(sites, "vera")
    matrices = draw_matrices(sites, 6, SEED)
    share_matrices(sites, matrices)
    for site in sites:
        live = matrices.A[[4, 1], : site.in_features]
        A, B = draw_unused(site, live, 4, torch.Generator().manual_seed(0))
        rows = [(matrices.A[:, : site.in_features] == a).all(1).nonzero().item() for a in A]
        assert sorted(rows) == [0, 2, 3, 5]
        assert torch.equal(B, matrices.B[: site.out_features, rows])
        again = draw_unused(site, live, 4, torch.Generator().manual_seed(0))
        assert torch.equal(A, again[0])
        assert torch.equal(B, again[1])


def test_a_start_is_the_papers_and_changes_no_output(x):
    config = peft.LoraConfig(r=RANK, target_modules=list(SIZES))
    model = peft.get_peft_model(Net(), config).double()
    before = model(x)
    sites = find_sites(model)
    convert(sites, "vera")
    share_matrices(sites, draw_matrices(sites, RANK, SEED))
    start_vectors(sites)
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)
    for site in sites:
        assert (site.gate == 0.1).all()
        assert not site.row_gate.any()


def test_a_state_dict_is_stock_and_holds_the_function(vera, x, use_dora):
    model, sites = vera
    saved = peft.get_peft_model_state_dict(model)
    assert not any("gate" in key for key in saved)
    for site in sites:
        key = f"base_model.model.{site.name}.lora_B.weight"
        assert torch.equal(saved[key], fold(site.B, site.gate, site.row_gate))
    twin = copy.deepcopy(model)
    model.load_state_dict(model.state_dict())
    for site, other in zip(sites, find_sites(twin), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(site.trained, other.trained, strict=True))
        assert torch.equal(site.B, other.B)
        site.gate.data.normal_()
    peft.set_peft_model_state_dict(model, saved)
    torch.testing.assert_close(model(x), twin(x), rtol=1e-11, atol=1e-11)
