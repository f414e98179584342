"""Scores of gated components: a gate is a part of what its component does."""

import copy

import pytest
import torch
from torch import nn

from rankflow.adapters.gating import add_gates
from rankflow.adapters.sites import find_sites
from rankflow.adapters.vera import add_vectors
from rankflow.importance.gate import Fisher, Taylor
from rankflow.importance.gradients import StepGradients
from rankflow.importance.norms import Frobenius, Norm
from rankflow.importance.sensitivity import Sensitivity
from rankflow.importance.tangential import Tangential

YES, ONE = torch.tensor(True), torch.ones(())


@pytest.fixture
def gated(steer, use_dora):
    """The steered model with random gates."""
    steered = steer(use_dora=use_dora)
    add_gates(steered.sites)
    for site in steered.sites:
        site.gate.data.normal_()
    return steered


@pytest.fixture
def vera(gated):
    """The same with frozen factors and random gates of rows."""
    add_vectors(gated.sites)
    for site in gated.sites:
        site.row_gate.data.normal_()
    return gated


@pytest.fixture
def folded(gated):
    """The same function without gates: they are folded into B."""
    twin = copy.deepcopy(gated)
    twin.sites = find_sites(twin.model)
    for site in twin.sites:
        B = nn.Parameter(site.effective_B.detach().clone())
        site.install(site.A, B, gate=nn.Parameter(torch.ones_like(site.gate)))
    return twin


def test_the_gate_gradient_is_seen_from_every_factor(gated):
    gated.backward(0)
    scorer = Taylor(gated.sites, 0.0)
    scorer.observe(ONE, YES)
    expected = []
    for site in gated.sites:
        for i in range(site.rank):
            from_gate = site.gate[i] * site.gate.grad[i]
            a, b = site.A[i].flatten(), site.B[:, i].flatten()
            from_A, from_B = a.dot(site.A.grad[i].flatten()), b.dot(site.B.grad[:, i].flatten())
            torch.testing.assert_close(from_A, from_gate, rtol=1e-9, atol=1e-14)
            torch.testing.assert_close(from_B, from_gate, rtol=1e-9, atol=1e-14)
            expected.append(from_gate.abs())
    torch.testing.assert_close(
        scorer.read().double(), torch.stack(expected).detach(), rtol=1e-5, atol=1e-12
    )
    assert min(expected) > 0


@pytest.mark.parametrize(
    "make",
    [
        lambda sites: Taylor(sites, 0.5),
        lambda sites: Fisher(sites, 0.5),
        lambda sites: Frobenius(sites, 0.5),
        Norm,
        Tangential,
    ],
    ids=["taylor", "fisher", "frobenius", "norm", "tangential"],
)
def test_a_score_is_that_of_the_same_component_without_a_gate(make, gated, folded):
    scores = []
    for steered in (gated, folded):
        scorer = make(steered.sites)
        steered.backward(1)
        scorer.observe(ONE, YES)
        scores.append(scorer.read().double())
    assert scores[0].min() > 0
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [lambda sites: Taylor(sites, 0.5), lambda sites: Frobenius(sites, 0.5), Norm, Tangential],
    ids=["taylor", "frobenius", "norm", "tangential"],
)
def test_a_score_of_vera_is_that_of_the_same_component_of_lora(make, vera):
    twin = copy.deepcopy(vera)
    twin.sites = find_sites(twin.model)
    for site in twin.sites:
        B = nn.Parameter(site.effective_B.detach().clone())
        A = nn.Parameter(site.A.detach().clone())
        site.install(A, B, gate=nn.Parameter(torch.ones_like(site.gate)))
        site.row_gate.data.fill_(1)
    scores = []
    for steered in (vera, twin):
        scorer = make(steered.sites)
        steered.backward(1)
        scorer.observe(ONE, YES)
        scores.append(scorer.read().double())
    assert scores[0].min() > 0
    torch.testing.assert_close(scores[0], scores[1], rtol=1e-5, atol=1e-12)


def test_clipping_is_seen_at_veras_start_where_row_gates_alone_have_gradients(vera):
    for site in vera.sites:
        site.row_gate.data.zero_()
    watcher = StepGradients(vera.sites)
    vera.backward(0)
    for parameter in vera.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.25)
    reading = watcher.read()
    assert reading.accept
    assert reading.unclip.item() == pytest.approx(4.0, rel=1e-6)
    watcher.close()


def test_sensitivity_adds_the_gate_s_own_like_adaloras_singular_value(gated):
    scorer = Sensitivity(gated.sites, 0.85)
    for step in range(3):
        gated.backward(step)
        scorer.observe(ONE, YES)
    mean, spread = {}, {}
    for step in range(3):
        gated.backward(step)
        for s, site in enumerate(gated.sites):
            if site.rank == 0:
                continue
            for f, (factor, _) in enumerate(site.factors):
                entry = (factor.detach() * factor.grad).abs()
                old = mean.get((s, f), torch.zeros_like(entry))
                mean[s, f] = 0.85 * old + 0.15 * entry
                gap = (entry - mean[s, f]).abs()
                spread[s, f] = 0.85 * spread.get((s, f), torch.zeros_like(gap)) + 0.15 * gap
    expected = []
    for s, site in enumerate(gated.sites):
        for i in range(site.rank):
            A, B, gate = (mean[s, f] * spread[s, f] for f in range(3))
            expected.append(A[i].mean() + B[:, i].mean() + gate[i])
    torch.testing.assert_close(scorer.read().double(), torch.stack(expected), rtol=1e-4, atol=1e-14)


def test_clipping_is_seen_at_the_very_start_where_gates_alone_have_gradients(gated):
    for site in gated.sites:
        site.gate.data.zero_()
    watcher = StepGradients(gated.sites)
    gated.backward(0)
    for parameter in gated.model.parameters():
        if parameter.grad is not None:
            parameter.grad.mul_(0.25)
    assert watcher.read().unclip.item() == pytest.approx(4.0, rel=1e-6)
    watcher.close()


def test_a_resize_is_followed(gated):
    scorers = [Taylor(gated.sites, 0.5), Frobenius(gated.sites, 0.5), Sensitivity(gated.sites, 0.5)]
    gated.backward(0)
    for scorer in scorers:
        scorer.observe(ONE, YES)
    before = [scorer.read() for scorer in scorers]
    site = gated.sites[4]  # the last, of rank 4: keep 1 and 3, then one newborn
    kept = torch.tensor([1, 3])
    new = [factor.detach().index_select(axis, kept) for factor, axis in site.factors]
    new = [
        torch.cat([t, torch.zeros_like(t.narrow(axis, 0, 1))], dim=axis)
        for t, (_, axis) in zip(new, site.factors, strict=True)
    ]
    names = ("A", "B", "gate")
    site.install(**{k: nn.Parameter(t) for k, t in zip(names, new, strict=False)})
    count = len(before[0])
    sources = torch.tensor([*range(count - 4), count - 3, count - 1, -1])
    for scorer, old in zip(scorers, before, strict=True):
        scorer.reindex(gated.sites, sources)
        assert torch.equal(scorer.read()[:-1], old[sources[:-1]])
        assert scorer.read()[-1] == 0
    gated.backward(1)
    for scorer in scorers:
        scorer.observe(ONE, YES)
        assert torch.isfinite(scorer.read()).all()
