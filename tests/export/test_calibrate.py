import copy
from functools import partial

import pytest
import torch
from torch.nn import functional

import rankflow as rf
from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import find_sites
from rankflow.errors import RankFlowError, SpecError
from rankflow.export.calibrate import loss_scores
from rankflow.export.decompose import AdaptedMatrix, decompose


def batches(count=3):
    draws = torch.Generator().manual_seed(7)
    return [torch.randint(12, (4, 4), generator=draws) for _ in range(count)]


def loss_of(model):
    def loss(batch):
        out = model(batch)
        return (out - torch.linspace(-1, 1, out.shape[1])).square().mean()

    return loss


def take_apart(model):
    sites = find_sites(model)
    parts = []
    for site in sites:
        A, B = site.A.flatten(1), site.B.flatten(1)
        matrix = AdaptedMatrix(site.name, A, B, site.scale, site.magnitude)
        parts.append(decompose(matrix, base_rows(site.layer)))
    return sites, parts


@torch.no_grad()
def loss_at(model, site, part, gates, batch):
    """The loss with a gate on every component, DoRA's factor m / n held where it is."""
    A, B, magnitude = site.A.clone(), site.B.clone(), site.magnitude
    held = None if magnitude is None else magnitude.clone()
    W = base_rows(site.layer)
    norms = (W + site.scale * B.flatten(1) @ A.flatten(1)).norm(dim=1)
    gated = (part.B * gates) @ part.A
    # The gated update in place of the old one, through factors of full rank.
    U, S, Vh = torch.linalg.svd(gated, full_matrices=False)
    rank = len(A)
    site.B.copy_((U * S)[:, :rank].reshape(B.shape))
    site.A.copy_(Vh[:rank].reshape(A.shape))
    if magnitude is not None:
        after = (W + site.scale * site.B.flatten(1) @ site.A.flatten(1)).norm(dim=1)
        magnitude.copy_((magnitude.flatten() * after / norms).view(magnitude.shape))
    value = float(loss_of(model)(batch))
    site.A.copy_(A)
    site.B.copy_(B)
    if magnitude is not None:
        magnitude.copy_(held)
    return value


def test_the_score_is_the_squared_derivative_by_a_gate(mixed, use_dora):
    model = mixed(use_dora=use_dora, r=2).double().eval()
    sites, parts = take_apart(model)
    data = batches(2)
    scores = loss_scores(model, sites, parts, loss_of(model), data)
    step = 1e-5
    for site, part, found in zip(sites, parts, scores, strict=True):
        for k in range(len(part.energies)):
            slopes = []
            for batch in data:
                sides = []
                for sign in (1, -1):
                    gates = torch.ones(len(part.energies), dtype=torch.float64)
                    gates[k] += sign * step
                    sides.append(loss_at(model, site, part, gates, batch))
                slopes.append((sides[0] - sides[1]) / (2 * step))
            expected = sum(slope**2 for slope in slopes) / len(slopes)
            assert found[k] == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_calibration_leaves_modes_flags_and_gradients_as_they_were(mixed):
    model = mixed(use_dora=True, r=4, lora_dropout=0.5)
    model.train()
    model.get_submodule("base_model.model.fan").eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sites, parts = take_apart(model)
    modes = [module.training for module in model.modules()]
    first = loss_scores(model, sites, parts, loss_of(model), batches())
    again = loss_scores(model, sites, parts, loss_of(model), batches())
    assert all((a == b).all() for a, b in zip(first, again, strict=True))  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_the_loss_does_not_see_goes_first(mixed):
    model = mixed(r=3)

    def blind(batch):  # the convolution is not part of it
        net = model.get_base_model()
        return net.second(torch.tanh(net.first(torch.tanh(net.fan(net.embed(batch)))))).sum()

    size = sum(site.parameters for site in find_sites(model))
    conv = next(site for site in find_sites(model) if site.name == "conv")
    conv.B.data *= 100  # by far the most energy
    cost = conv.in_features + conv.out_features
    result = rf.compress(model, size - 3 * cost, loss=blind, batches=batches())
    assert result.worth == "loss"
    assert result.ranks == {"embed": 3, "fan": 3, "first": 3, "second": 3, "conv": 0}


def test_a_calibration_that_cannot_work_is_refused_and_changes_nothing(mixed):
    model = mixed(r=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = loss_of(model)
    other = mixed(r=3)
    cases = [
        ({"loss": loss}, SpecError, "both loss and batches"),
        ({"batches": batches()}, SpecError, "both loss and batches"),
        ({"loss": loss, "batches": []}, RankFlowError, "the calibration set is empty"),
        ({"loss": loss_of(other), "batches": batches()}, RankFlowError, "does not depend on the"),
        (
            {"loss": lambda batch: loss(batch) * torch.inf, "batches": batches()},
            RankFlowError,
            "a gradient that is not finite",
        ),
    ]
    for options, error, match in cases:
        with pytest.raises(error, match=match):
            rf.compress(model, 60, **options)
    budget = rf.load_budget("reallocate", rank=1, magnitude="never")
    with pytest.raises(SpecError, match="magnitude = 'always'"):
        rf.compress(model, budget, loss=loss, batches=batches())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


class Planted(torch.nn.Module):
    """Four residual layers in a row."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(24, 24) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.fixture
def planted(adapt):
    """A DoRA of rank 16 that has learned updates of ranks 1, 14, 3 and 10, and its data."""
    inputs, teacher, base = torch.randn(1024, 24), Planted(), Planted()
    base.load_state_dict(teacher.state_dict())
    for layer, rank in zip(teacher.layers, (1, 14, 3, 10), strict=True):
        update = torch.randn(24, rank) @ torch.randn(rank, 24)
        layer.weight.data += update / (3 * 24**0.5)
    with torch.no_grad():
        targets = teacher(inputs) + 0.01 * torch.randn(1024, 24)
    sites = [f"layers.{i}" for i in range(4)]
    model = adapt(base, r=16, lora_alpha=16, use_dora=True, target_modules=sites, trained=False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 300)
    for step in range(300):
        rows = slice(128 * (step % 4), 128 * (step % 4) + 128)
        functional.mse_loss(model(inputs[rows]), targets[rows]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model, lambda model, rows: functional.mse_loss(model(inputs[rows]), targets[rows])


def test_half_of_a_trained_dora_of_rank_16_is_chosen_better_than_evenly(planted):
    model, measure = planted
    half = sum(site.parameters for site in find_sites(model)) // 2
    trained = slice(0, 512)
    batches = [slice(64 * i, 64 * i + 64) for i in range(8)]
    found = {}
    for way, policy in (("even", "uniform"), ("energy", "knapsack"), ("loss", "knapsack")):
        copied = copy.deepcopy(model)
        calibration = {"loss": partial(measure, copied), "batches": batches}
        budget = rf.load_budget("reallocate", params=half, policy=policy)
        result = rf.compress(copied, budget, **(calibration if way == "loss" else {}))
        assert 0.9 * half < result.parameters <= half
        with torch.no_grad():
            found[way] = result.error, float(measure(copied, slice(512, 1024)))
            assert float(measure(copied, trained)) < 0.1
    (even_error, even_loss), (error, loss), (_, calibrated) = found.values()
    assert error < 0.8 * even_error
    assert loss < 0.85 * even_loss
    assert calibrated < 0.85 * even_loss
