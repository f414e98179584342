import pytest
import torch

from rankflow.adapters.sites import find_sites
from rankflow.importance.gate import Fisher, Taylor

YES, ONE = torch.tensor(True), torch.ones(())


def gates_by_autograd(steered, batch):
    """dL/dc with a gate c really put on every component of the model."""
    names = {id(p): name for name, p in steered.model.named_parameters()}
    gates = [torch.ones(s.rank, dtype=s.B.dtype, requires_grad=True) for s in steered.sites]
    gated = {
        names[id(site.B)]: site.B * gate.view(1, -1, *[1] * (site.B.ndim - 2))
        for site, gate in zip(steered.sites, gates, strict=True)
    }
    tokens, target = batch
    out = torch.func.functional_call(steered.model, gated, (tokens,))
    (out - target).square().mean().backward()
    return torch.cat([g.grad for g in gates if g.numel()]).double()


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_scores_are_moments_of_the_gradient_of_a_real_gate(decay, steer, use_dora):
    steered = steer(use_dora=use_dora)
    taylor, fisher = Taylor(steered.sites, decay), Fisher(steered.sites, decay)
    squares = []
    for step in range(5):
        squares.append(gates_by_autograd(steered, steered.batch(step)) ** 2)
        steered.backward(step)
        for scorer in (taylor, fisher):
            scorer.observe(ONE, YES)
        steered.drift(step)
    weights = torch.tensor([decay ** (4 - i) for i in range(5)], dtype=torch.float64)
    expected = (weights / weights.sum()) @ torch.stack(squares)
    assert expected.min() > 0
    torch.testing.assert_close(taylor.read().double(), expected.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(fisher.read().double(), expected / 2, rtol=1e-5, atol=0)


def test_a_gate_in_the_dense_formula_has_that_gradient(layer_case, host, adapt, use_dora):
    model = adapt(host(layer_case), use_dora=use_dora).double()
    (site,) = find_sites(model)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    model(x).pow(3).sum().backward()
    scorer = Taylor([site], 0.0)
    scorer.observe(ONE, YES)

    base = site.layer.get_base_layer()
    gate = torch.ones(3, dtype=torch.float64, requires_grad=True)
    V = layer_case.matrix(base.weight.detach())
    for i in range(3):
        b, a = site.B.detach().flatten(1)[:, i], site.A.detach().flatten(1)[i]
        V = V + site.scale * gate[i] * torch.outer(b, a)
    if use_dora:  # the norm is detached, as in the paper
        ratio = site.magnitude.detach().flatten() / V.detach().norm(dim=1)
        V = ratio[:, None] * V
    weight = layer_case.weight_like(V, base.weight)
    bias = getattr(base, "bias", None)
    out = layer_case.apply(base, x, weight, None if bias is None else bias.detach())
    out.pow(3).sum().backward()
    torch.testing.assert_close(scorer.read().double(), gate.grad.abs(), rtol=1e-5, atol=0)


def test_both_factors_tell_the_same_gate_gradient(steer, use_dora):
    steered = steer(use_dora=use_dora)
    steered.backward(0)
    for _, a, b, da, db in steered.components():
        torch.testing.assert_close(a.dot(da), b.dot(db), rtol=1e-9, atol=1e-14)


def test_the_score_is_the_slope_of_the_loss_as_a_component_is_scaled_down(steer):
    steered = steer()  # in DoRA the norm would move too, which the gradient holds fixed
    scorer = Taylor(steered.sites, 0.0)
    steered.backward(3)
    scorer.observe(ONE, YES)
    site = steered.sites[2]
    batch = steered.batch(3)
    with torch.no_grad():
        step = 1e-5
        site.B[:, 1] *= 1 + step
        above = steered.loss(batch)
        site.B[:, 1] *= (1 - step) / (1 + step)
        below = steered.loss(batch)
    slope = (above - below) / (2 * step)
    assert scorer.read()[3].item() == pytest.approx(abs(slope.item()), rel=1e-4)


def test_a_component_of_zeros_scores_zero(steer):
    steered = steer()
    steered.sites[2].A.data[1] = 0
    scorer = Taylor(steered.sites, 0.0)
    steered.backward(0)
    scorer.observe(ONE, YES)
    assert scorer.read()[3] == 0
    assert (scorer.read()[[0, 1, 2, 4]] > 0).all()


def test_a_frozen_site_scores_zero_instead_of_failing(steer):
    steered = steer()
    steered.sites[2].A.requires_grad_(False)
    scorer = Fisher(steered.sites, 0.0)
    steered.backward(0)
    scorer.observe(ONE, YES)
    assert scorer.read()[2:5].tolist() == [0, 0, 0]
    assert (scorer.read()[[0, 1, 5, 6, 7, 8, 9]] > 0).all()
