import numpy as np
import pytest
import torch

from rankflow import dem
from rankflow.adapters.gating import add_gates
from rankflow.adapters.sites import find_sites


def reference(sites, components):
    """R by its definition, entry by entry over the dense rank-1 vectors."""
    total = 0.0
    for site in sites:
        A = site.A.detach().double().numpy()
        B = site.B.detach().double().numpy()
        for i in range(site.rank):
            for vector in (A[i].ravel(), B[:, i].ravel()):
                total += sum((entry - vector.mean()) ** 2 for entry in vector) / vector.size
    return total / (2 * components)


@pytest.fixture
def sites(mixed):
    """Gated sites of every kind, in float64."""
    model = mixed().double()
    found = find_sites(model)
    add_gates(found)
    for site in found:
        site.gate.data.normal_()
    return found


def test_the_penalty_is_the_formula(sites):
    expected = reference(sites, 20)
    assert dem.penalty(sites, 20).item() == pytest.approx(expected, rel=1e-12)
    assert expected > 0


def test_the_gradient_is_that_of_the_penalty(sites):
    parameters = [p for site in sites for p in (site.A, site.B)]
    (0.3 * dem.penalty(sites, 20)).backward()
    by_autograd = [p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    dem.add_gradient(sites, 20, 0.3)
    for p, expected in zip(parameters, by_autograd, strict=True):
        assert p.grad.shape == p.shape
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-16)
    assert all(site.gate.grad is None for site in sites)


def test_the_gradient_is_added_to_the_losss(sites):
    dem.add_gradient(sites, 20, 0.3)
    once = [site.B.grad.clone() for site in sites]
    for site in sites:
        site.B.grad = torch.ones_like(site.B)
    dem.add_gradient(sites, 20, 0.3)
    for site, gradient in zip(sites, once, strict=True):
        torch.testing.assert_close(site.B.grad, 1 + gradient, rtol=1e-12, atol=1e-15)


def test_square_factors_are_pulled_along_the_right_axis(adapt):
    model = adapt(torch.nn.ModuleDict({"layer": torch.nn.Linear(3, 3)}), r=3).double()
    sites = find_sites(model)
    dem.add_gradient(sites, 3, 1.0)
    for factor, axis in ((sites[0].A, 1), (sites[0].B, 0)):
        assert np.allclose(factor.grad.sum(axis), 0, atol=1e-16)
        assert not np.allclose(factor.grad.sum(1 - axis), 0, atol=1e-3)


def test_frozen_factors_get_no_gradient(sites):
    sites[1].A.requires_grad_(False)
    dem.add_gradient(sites, 20, 0.3)
    assert sites[1].A.grad is None
    assert sites[1].B.grad is not None


def test_low_precision_is_summed_in_float32(mixed):
    sites = find_sites(mixed().bfloat16())
    assert dem.penalty(sites, 20).dtype == torch.float32
    assert dem.penalty(sites, 20).item() == pytest.approx(reference(sites, 20), rel=1e-5)
    dem.add_gradient(sites, 20, 0.3)
    assert sites[0].A.grad.dtype == torch.bfloat16
