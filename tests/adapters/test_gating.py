import math

import pytest
import torch

from rankflow.adapters.gating import add_gates, check_untrained, draw_components, start_gates
from rankflow.adapters.sites import find_sites
from rankflow.errors import SiteError


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_a_start_draws_kaimings_factors_under_gates_of_zero(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=3)
    sites = find_sites(model)
    add_gates(sites)
    start_gates(sites, generator())
    for site in sites:
        assert not site.gate.any()
        assert site.A.abs().max() <= 1 / math.sqrt(site.in_features)
        assert site.B.abs().max() <= 1 / math.sqrt(3)
        assert site.A.unique().numel() == site.A.numel()
        assert site.B.unique().numel() == site.B.numel()


def test_a_start_changes_no_output_of_an_untrained_adapter(mixed, use_dora):
    model = mixed(trained=False, use_dora=use_dora)
    tokens = torch.arange(8).view(2, 4)
    before = model(tokens)
    sites = find_sites(model)
    check_untrained(sites)
    add_gates(sites)
    start_gates(sites, generator())
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)


def test_the_draws_are_uniform_with_kaimings_variance(adapt):
    site = find_sites(adapt(torch.nn.ModuleDict({"layer": torch.nn.Linear(400, 300)})))[0]
    A, B = draw_components(site, 200, 50, generator())
    # 60,000 and more numbers: three standard errors of their variance are 1.1% at most.
    assert A.var().item() == pytest.approx(1 / (3 * 400), rel=0.02)
    assert B.var().item() == pytest.approx(1 / (3 * 50), rel=0.02)
    assert abs(A.mean().item()) < 1e-3
    assert abs(B.mean().item()) < 1e-2


def test_equal_seeds_draw_equal_factors_in_the_layout_of_the_site(layer_case, host, adapt):
    (site,) = find_sites(adapt(host(layer_case)).double())
    A, B = draw_components(site, 2, 3, generator(5))
    again = draw_components(site, 2, 3, generator(5))
    assert torch.equal(A, again[0])
    assert torch.equal(B, again[1])
    assert not torch.equal(A, draw_components(site, 2, 3, generator(6))[0])
    assert A.shape == (2, *site.A.shape[1:])
    assert B.shape == (len(site.B), 2, *site.B.shape[2:])
    assert A.dtype == B.dtype == torch.float64


def test_a_trained_site_is_named_and_refused(mixed):
    sites = find_sites(mixed(trained=False))
    sites[3].B.data[0, 0] = 1e-3
    with pytest.raises(SiteError, match="1 of 5 sites have been trained, the first is 'second'"):
        check_untrained(sites)
