import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from rankflow.adapters.sites import find_sites
from rankflow.adapters.weight_gradient import project


def dense_gradient(case, layer, x, delta):
    """The gradient of the base weight as (out, in), by autograd through the dense operation."""
    weight = layer.weight.detach().double().requires_grad_()
    bias = None if getattr(layer, "bias", None) is None else layer.bias.detach().double()
    y = case.apply(layer, x.double() if x.is_floating_point() else x, weight, bias)
    return case.matrix(torch.autograd.grad(y, weight, delta.double())[0])


def test_products_are_those_of_the_dense_gradient(layer_case, host, adapt):
    model = adapt(host(layer_case)).double()
    (site,) = find_sites(model)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    delta = torch.randn_like(model(x))
    right = torch.randn(site.in_features, 4).double()
    left = torch.randn(site.out_features, 5).double()
    G = dense_gradient(layer_case, site.layer.get_base_layer(), x, delta)
    Y, Z = project(site, x, delta, right, left)
    torch.testing.assert_close(Y, G @ right)
    torch.testing.assert_close(Z, left.T @ G)


@pytest.mark.filterwarnings("ignore:Using padding=.same. with even kernel")
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_a_convolution_padded_by_name_is_understood(padding, adapt):
    layer = nn.Conv2d(3, 4, (3, 4), padding=padding)  # an even kernel pads unevenly
    model = adapt(nn.ModuleDict({"layer": layer})).double()
    (site,) = find_sites(model)
    x = torch.randn(2, 3, 6, 7).double()
    y = site.layer(x)
    delta = torch.randn_like(y)
    weight = layer.weight.detach().clone().requires_grad_()
    y = nn.functional.conv2d(x, weight, padding=padding)
    G = torch.autograd.grad(y, weight, delta)[0].flatten(1)
    eye_in, eye_out = torch.eye(36).double(), torch.eye(4).double()
    for product in project(site, x, delta, eye_in, eye_out):
        torch.testing.assert_close(product, G)


@pytest.mark.parametrize("make", [nn.Embedding, Gemma3TextScaledWordEmbedding])
def test_padding_tokens_have_no_gradient_and_a_scaled_embedding_its_scale(make, adapt):
    scaled = {} if make is nn.Embedding else {"embed_scale": 2.5}
    layer = make(11, 6, padding_idx=3, **scaled)
    model = adapt(nn.ModuleDict({"layer": layer})).double()
    (site,) = find_sites(model)
    tokens = torch.randint(11, (4, 9))
    tokens[0, :4] = 3
    delta = torch.randn(4, 9, 6).double()
    layer.weight.requires_grad_()
    G = torch.autograd.grad(layer(tokens), layer.weight, delta)[0].T
    assert not G[:, 3].any()
    for product in project(site, tokens, delta, torch.eye(11).double(), torch.eye(6).double()):
        torch.testing.assert_close(product, G)


def test_half_precision_products_do_not_overflow(adapt):
    model = adapt(nn.ModuleDict({"layer": nn.Linear(5, 6)}))
    (site,) = find_sites(model)
    x, delta = torch.full((64, 5), 100.0).half(), torch.full((64, 6), 1000.0).half()
    for product in project(site, x, delta, torch.ones(5, 1), torch.ones(6, 1)):
        assert product.dtype == torch.float32
        assert torch.isfinite(product).all()


def test_autocast_does_not_choose_the_precision(adapt):
    model = adapt(nn.ModuleDict({"layer": nn.Linear(50, 60)}))
    (site,) = find_sites(model)
    inputs = torch.randn(8, 50), torch.randn(8, 60), torch.randn(50, 4), torch.randn(60, 4)
    expected = project(site, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        actual = project(site, *inputs)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
