"""What a replayed CUDA graph does not tell Python is not missed."""

from itertools import count

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from rankflow.adapters import norm_cache
from rankflow.adapters.base_weight import row_norms
from rankflow.adapters.dora import accelerate_dora, norms_of
from rankflow.adapters.sites import find_sites
from rankflow.engine import RankFlow
from rankflow.importance import gradients
from rankflow.importance.gradients import StepGradients
from rankflow.specs.budget import BudgetSpec


class Capture:
    """Whether a graph is being captured: on a CPU nothing else comes of it."""

    on = False

    def __call__(self, tensor):
        return self.on


@pytest.fixture
def capture(monkeypatch):
    capture = Capture()
    for module in (norm_cache, gradients):
        monkeypatch.setattr(module, "is_capturing", capture)
    return capture


def dense_norms(site):
    weight = site.layer.get_base_layer().weight
    return row_norms(site.layer, weight + site.scale * site.B @ site.A)


@pytest.fixture
def dora_site(adapt):
    model = adapt(nn.ModuleDict({"layer": nn.Linear(6, 5)}), use_dora=True)
    accelerate_dora(model)
    return find_sites(model)[0]


def test_a_norm_is_measured_within_the_graph_and_not_taken_from_before(
    dora_site, capture, monkeypatch
):
    measured = count()
    measure = norm_cache.measure_norms
    monkeypatch.setattr(
        norm_cache, "measure_norms", lambda *a, **k: next(measured) < 0 or measure(*a, **k)
    )
    x = torch.randn(2, 6)
    dora_site.layer(x)
    dora_site.layer(x)
    assert next(measured) == 1
    capture.on = True
    dora_site.layer(x)
    dora_site.layer(x)
    assert next(measured) == 4


def test_a_norm_of_the_graph_is_not_taken_for_one_of_today(dora_site, capture):
    x = torch.randn(2, 6)
    dora_site.layer(x)
    before = norms_of(dora_site)
    capture.on = True
    dora_site.layer(x)
    capture.on = False
    assert norms_of(dora_site) is before


def test_an_optimizers_step_that_was_replayed_is_counted_by_the_engine(adapt):
    """A fused step leaves no trace on its tensors, and within a graph no hook runs either."""
    model = adapt(nn.ModuleDict({"layer": nn.Linear(6, 5)}), use_dora=True)
    flow = RankFlow(model, BudgetSpec(rank=1, every=50), total_steps=100)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    (site,) = flow._sites
    site.layer(torch.randn(2, 6)).sum().backward()
    flow.observe()
    norms_of(site)
    site.B.data.numpy()[:] += 1.0  # as a replay writes
    flow.step(optimizer)
    torch.testing.assert_close(norms_of(site), dense_norms(site))


def test_a_norm_that_was_captured_undoes_the_clipping_of_every_replay(adapt, capture):
    model = adapt(nn.ModuleDict({"layer": nn.Linear(6, 5)}))
    sites = find_sites(model)
    watched = StepGradients(sites)
    layer, x = sites[0].layer, torch.randn(2, 6)
    layer(x).square().sum().backward()  # warm-up, which nobody observes
    model.zero_grad(set_to_none=True)
    capture.on = True
    layer(x).square().sum().backward()
    capture.on = False
    captured = watched._captured[sites[0].B]
    for replay in (1.0, 4.0, 0.5):
        for parameter in sites[0].trained:  # a replay writes into the same tensors
            parameter.grad.copy_(replay * torch.ones_like(parameter))
        captured.copy_(sites[0].B.grad.norm())
        total = torch.stack([p.grad.norm() for p in sites[0].trained]).norm()
        clip_grad_norm_(sites[0].trained, 0.1)
        torch.testing.assert_close(watched.read().unclip, total / 0.1, rtol=1e-4, atol=0)


def test_an_eager_step_in_between_is_seen_by_its_hooks(adapt, capture):
    model = adapt(nn.ModuleDict({"layer": nn.Linear(6, 5)}))
    sites = find_sites(model)
    watched = StepGradients(sites)
    layer, x = sites[0].layer, torch.randn(2, 6)
    capture.on = True
    layer(x).square().sum().backward()
    capture.on = False
    watched._captured[sites[0].B].fill_(float("nan"))  # of a replay that is long past
    model.zero_grad(set_to_none=True)
    layer(x).square().sum().backward()
    reading = watched.read()
    assert reading.accept
    assert reading.unclip == 1


# On a GPU


BUDGET = {
    "rank": 3,
    "start": 2.0,
    "schedule": "linear",
    "warmup": 5,
    "every": 5,
    "cooldown": 2,
    "protect": 0,
    "grow": "orthogonal",
}
STEPS = 12
KINDS = {
    "LoRA": {"score": "taylor"},
    "hybrid": {"score": "taylor", "magnitude": "budgeted"},
}


class Run:
    """A tiny Llama whose forward, backward and clipping are replayed, compiled, or neither."""

    def __init__(self, make, adapt, how, **budget):
        torch.manual_seed(3)
        use_dora = "magnitude" in budget
        self.model = adapt(make(), r=4, target_modules="all-linear", use_dora=use_dora).cuda()
        self.flow = RankFlow(self.model, BudgetSpec(**BUDGET, **budget), total_steps=STEPS)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
        self.tokens = torch.zeros(2, 12, dtype=torch.long, device="cuda")
        self.is_replayed = how == "replayed"
        self.forward = self.model
        if how == "compiled":
            self.forward = torch.compile(self.model, mode="reduce-overhead")
        self.graph, self.losses = None, []

    def compute(self):
        self.model.zero_grad(set_to_none=True)
        self.loss = self.forward(input_ids=self.tokens, labels=self.tokens).loss
        self.loss.backward()
        clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)

    def capture(self):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.compute()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.compute()

    def step(self, number):
        self.tokens.copy_((torch.arange(24, device="cuda").view(2, 12) * (number + 1)) % 13)
        if self.is_replayed:
            if self.graph is None:
                self.capture()
            self.graph.replay()
        else:
            torch.compiler.cudagraph_mark_step_begin()
            self.compute()
        self.losses.append(self.loss.detach().clone())
        self.flow.observe(loss=self.loss.detach())
        self.optimizer.step()
        if self.flow.step(self.optimizer) is not None:
            self.graph = None


# torch's own tracer makes an instance of autograd.Function, and torch warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.gpu
@pytest.mark.parametrize("how", ["replayed", "compiled"])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_losses_and_ranks_are_those_of_eager_steps_across_events(kind, how, llama, adapt):
    torch._dynamo.reset()
    runs = [Run(llama, adapt, each, **kind) for each in ("eager", how)]
    for number in range(STEPS):
        for run in runs:
            run.step(number)
    eager, other = runs
    assert len({tuple(event.ranks.values()) for event in eager.flow.history}) > 1
    assert [e.ranks for e in other.flow.history] == [e.ranks for e in eager.flow.history]
    assert other.losses[0] > other.losses[-1] > 0
    torch.testing.assert_close(other.losses, eager.losses, rtol=1e-3, atol=1e-4)
    torch._dynamo.reset()
