"""Births through the engine: where newborns point, how they start, what is watched for that."""

import copy
import statistics

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional

from rankflow.adapters.sites import find_sites
from rankflow.engine import RankFlow
from rankflow.specs.budget import BudgetSpec

STEPS = 48
# Events after steps 12, 20, 28 and 36; at the first the budget has not grown yet.
TIMES = {"warmup": 12, "cooldown": 12, "every": 8, "grow_steps": 3}
GROW = TIMES | {"rank": 4, "start": 0.25, "schedule": "linear", "recycle": 0.0, "protect": 0}
# Three steps are watched from the start on, as something may move at the first event.
MOVE = TIMES | {"rank": 2, "recycle": 0.9, "warmup": 3}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def start(budget, total_steps=STEPS, **config):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["first", "second"], **config)
    model = peft.get_peft_model(Net(), config).double()
    flow = RankFlow(model, BudgetSpec(**budget), total_steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    return model, flow, optimizer


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(16, 6, generator=generator, dtype=torch.float64)
    y = (x[:, :3] * torch.tensor([1.0, -2.0, 0.5])).argmax(1)
    return functional.cross_entropy(model(x), y)


def take_step(model, flow, optimizer, step, watch=None):
    loss_of(model, step).backward()
    flow.observe()
    if watch is not None:
        watch()
    optimizer.step()
    optimizer.zero_grad()
    return flow.step(optimizer)


def hooked(sites):
    (state,) = {bool(site.layer._forward_hooks) for site in sites}
    return state


# When gradients are watched


def test_gradients_are_watched_only_in_the_steps_before_an_event():
    model, flow, optimizer = start(GROW)
    sites = find_sites(model)
    watched = []
    for step in range(STEPS):
        watched.append(hooked(sites))
        take_step(model, flow, optimizer, step)
    assert [bool(event.born) for event in flow.history] == [False, True, True, True]
    windows = [17, 18, 19, 25, 26, 27, 33, 34, 35]  # counted from 0
    assert [step for step, seen in enumerate(watched) if seen] == windows


@pytest.mark.parametrize(
    "changes",
    [
        {"grow": "orthogonal"},
        {"grow": "random"},
        {"start": 1.5, "schedule": "linear"},  # what falls leaves nothing to be born
        {"start": 1.0, "schedule": "constant", "policy": "uniform"},
    ],
    ids=str,
)
def test_gradients_are_never_watched_where_they_decide_nothing(changes):
    model, flow, optimizer = start(GROW | changes)
    for step in range(STEPS):
        assert not hooked(find_sites(model))
        take_step(model, flow, optimizer, step)


def test_a_window_longer_than_the_time_between_events_begins_at_the_event_before():
    model, flow, optimizer = start(MOVE | {"every": 2, "grow_steps": 20})
    counts = []

    def note():
        counts.append(flow.state_dict()["sketch"]["count"].item())

    for step in range(11):
        assert hooked(find_sites(model))
        take_step(model, flow, optimizer, step, watch=note)
    assert counts == [1, 2, 3, 1, 2, 1, 2, 1, 2, 1, 2]
    for step in range(11, 36):
        take_step(model, flow, optimizer, step)
    assert not hooked(find_sites(model))


def test_a_closed_engine_leaves_no_hook():
    model, flow, _ = start(MOVE)
    assert hooked(find_sites(model))
    flow.close()
    assert not hooked(find_sites(model))


# Where newborns point


def dense_gradients(model, sites, step):
    """The gradient of each site's effective weight in one step, DoRA's factor m / n taken off."""
    weights = [site.layer.get_base_layer().weight for site in sites]
    for weight in weights:
        weight.requires_grad_()
    gradients = torch.autograd.grad(loss_of(model, step), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return [g / factor(site) for g, site in zip(gradients, sites, strict=True)]


@torch.no_grad()
def factor(site):
    """m / n of every row, dense."""
    if site.magnitude is None:
        return torch.ones(site.out_features, 1).double()
    rows = site.layer.get_base_layer().weight + site.scale * site.B @ site.A
    return (site.magnitude / rows.norm(dim=1)).unsqueeze(1)


def test_newborns_point_along_the_averaged_gradient_outside_of_what_lives(use_dora):
    model, flow, optimizer = start(GROW, use_dora=use_dora)
    sites = find_sites(model)
    born = 0
    window = []
    for step in range(STEPS):
        window = [*window, dense_gradients(model, sites, step)][-3:]
        loss_of(model, step).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        before = [(site.A.detach().clone(), factor(site)) for site in sites]
        event = flow.step(optimizer)
        if event is None or not event.born:
            continue
        for i, site in enumerate(sites):
            (live, c), births = before[i], site.rank - len(before[i][0])
            average = c * sum(gradients[i] for gradients in window) / 3
            outside = average - average @ torch.linalg.pinv(live) @ live
            expected = torch.linalg.svd(outside).Vh[:births]
            rows = site.A.detach()[len(live) :]
            torch.testing.assert_close(
                (rows @ expected.T).abs(), torch.eye(births).double() / 3**0.5
            )
            born += births
    assert born >= 3


def test_without_a_gradient_there_are_orthogonal_newborns_all_the_same():
    rows = []
    for grow in ("gradient", "orthogonal"):
        model, flow, optimizer = start(GROW | {"grow": grow, "score": "uniform"})
        for _ in range(20):
            (0 * loss_of(model, 0)).backward()
            flow.observe()
            optimizer.step()
            optimizer.zero_grad()
            flow.step(optimizer)
        assert flow.history[1].born
        rows.append([site.A.detach() for site in find_sites(model)])
    for a, b in zip(*rows, strict=True):
        assert torch.equal(a, b)


def test_random_newborns_are_drawn_as_peft_draws_them():
    model, flow, optimizer = start(GROW | {"grow": "random"})
    for step in range(20):
        take_step(model, flow, optimizer, step)
    born = flow.history[1].born
    site = next(s for s in find_sites(model) if s.name == born[0].site)
    row = site.A.detach()[born[0].component]
    assert row.abs().max() < 1 / site.in_features**0.5
    assert row.norm().item() != pytest.approx(1 / 3**0.5, rel=1e-6)


@pytest.mark.parametrize("grow", ["gradient", "orthogonal", "random"])
def test_every_way_of_growing_keeps_function_and_budget(grow, use_dora):
    model, flow, optimizer = start(GROW | {"grow": grow}, use_dora=use_dora)
    births = 0
    for step in range(STEPS):
        loss_of(model, step).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        before = loss_of(model, 999).item()
        event = flow.step(optimizer)
        if event is not None:
            births += len(event.born)
            assert loss_of(model, 999).item() == pytest.approx(before, rel=1e-13)
            assert flow.spent <= flow.limit
    assert births >= 3


# Which steps count


def test_clipping_and_loss_scales_do_not_reach_the_sketch():
    sketches = []
    for clip, scale in ((None, 1.0), (1e-3, 1.0), (1e-3, 256.0)):
        model, flow, _ = start(MOVE)
        (scale * loss_of(model, 0)).backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= scale
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        flow.observe(loss_scale=scale)
        sketches.append(flow.state_dict()["sketch"])
    assert sketches[0]["0.Y"].abs().max() > 0
    for other in sketches[1:]:
        assert all(torch.equal(other[key], sketches[0][key]) for key in other)


def test_a_step_whose_gradients_are_not_finite_does_not_reach_the_sketch():
    model, flow, optimizer = start(MOVE)
    take_step(model, flow, optimizer, 0)
    before = flow.state_dict()["sketch"]
    (float("inf") * loss_of(model, 1)).backward()
    flow.observe()
    after = flow.state_dict()["sketch"]
    assert before["count"] == 1
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("stopped", [17, 18, 19])
def test_a_run_killed_within_a_window_grows_the_same_after_its_resume(stopped, use_dora):
    model, flow, optimizer = start(GROW, use_dora=use_dora)
    for step in range(stopped):
        take_step(model, flow, optimizer, step)
    saved = copy.deepcopy((flow.state_dict(), model.state_dict(), optimizer.state_dict()))
    assert saved[0]["sketch"]
    for step in range(stopped, 22):
        take_step(model, flow, optimizer, step)
    assert flow.history[1].born

    twin, _, _ = start(GROW, use_dora=use_dora)
    resumed = RankFlow(twin, BudgetSpec(**GROW), STEPS, resume=saved[0])
    twin.load_state_dict(saved[1])
    other = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=0.02)
    other.load_state_dict(saved[2])
    for step in range(stopped, 22):
        take_step(twin, resumed, other, step)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b)


# What it brings


def loss_after_birth(grow, seed, steps=20, width=64):
    """Regression whose target lacks one direction, which a site of rank 1 learns from an event on.

    Returns the share of the missing update's error that is left so many steps after the birth.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    torch.manual_seed(seed)
    layer = nn.Linear(width, width, bias=False)
    left, right = (torch.linalg.qr(normal(width, 2)).Q for _ in range(2))
    target = layer.weight.detach() + left @ right.T
    config = peft.LoraConfig(r=1, lora_alpha=1, target_modules=["layer"])
    model = peft.get_peft_model(nn.ModuleDict({"layer": layer}), config)
    budget = {"rank": 2, "start": 0.5, "schedule": "linear", "warmup": 50, "cooldown": 100}
    budget |= {"every": 50, "score": "uniform", "grow": grow, "seed": seed}
    flow = RankFlow(model, BudgetSpec(**budget), 200)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    (site,) = find_sites(model)

    def error():
        with torch.no_grad():
            return (target - layer.weight - site.scale * site.B @ site.A).square().sum().item()

    before = None
    for _ in range(100 + steps):
        x = normal(32, width)
        y = x @ target.T + 0.1 * normal(32, width)
        (site.layer(x) - y).square().mean().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        if flow.step(optimizer) is not None and site.rank == 2:
            before = error()
    assert before is not None
    return error() / before


def test_newborns_along_the_gradient_learn_faster_than_random_ones():
    seeds = range(8)
    left = {g: [loss_after_birth(g, s) for s in seeds] for g in ("gradient", "orthogonal")}
    assert all(g < o for g, o in zip(left["gradient"], left["orthogonal"], strict=True))
    learnt = {g: 1 - statistics.mean(values) for g, values in left.items()}
    assert learnt["gradient"] > 1.5 * learnt["orthogonal"]


# How newborns start


def update_ratios(use_dora, fair=True):
    """Sizes of newborns' first 20 updates over those of a fresh optimizer on equal gradients."""
    late = 300
    budget = GROW | {"rank": 2, "start": 0.6, "warmup": 150, "cooldown": 100, "every": 150}
    model, flow, optimizer = start(budget, total_steps=400, use_dora=use_dora)
    if not fair:
        flow._observers.fair_start.close()
        flow._observers.fair_start.attach = lambda optimizer: None
    for step in range(late):
        take_step(model, flow, optimizer, step)
    born = {change.site for change in flow.history[1].born}
    slices = []
    for site in find_sites(model):
        first = flow.history[1].ranks_before[site.name]
        if site.name in born and first > 0:
            slices += [(site.A, 0, first), (site.B, 1, first)]
    assert slices

    def newborns(tensors):
        return [t.detach().narrow(axis, i, t.shape[axis] - i).clone() for t, axis, i in tensors]

    fresh = [nn.Parameter(value) for value in newborns(slices)]
    other = torch.optim.AdamW(fresh, lr=0.02)
    ratios = []
    for step in range(late, late + 20):
        gradients = []

        def note(gradients=gradients):
            gradients += newborns([(p.grad, axis, i) for p, axis, i in slices])

        before = newborns(slices)
        take_step(model, flow, optimizer, step, watch=note)
        for parameter, value, gradient in zip(fresh, before, gradients, strict=True):
            parameter.data, parameter.grad = value.clone(), gradient
        other.step()
        for parameter, value, now in zip(fresh, before, newborns(slices), strict=True):
            size = (parameter.detach() - value).norm()
            if size > 0:  # the first gradient of A is zero, as b is
                ratios.append(((now - value).norm() / size).item())
    return ratios


def test_the_first_updates_of_newborns_are_those_of_components_at_step_zero(use_dora):
    ratios = update_ratios(use_dora)
    assert len(ratios) >= 38
    assert all(1 / 1.01 < ratio < 1.01 for ratio in ratios)  # the promise is 1.5
    assert max(update_ratios(use_dora, fair=False)) > 3


@pytest.mark.parametrize("grow", ["gradient", "orthogonal"])
def test_a_site_that_begins_without_components_gets_some_if_its_gradient_asks(grow):
    torch.manual_seed(0)
    layers = nn.ModuleDict({name: nn.Linear(8, 8, bias=False) for name in ("a", "b")})
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["a", "b"])
    model = peft.get_peft_model(layers, config)
    spec = BudgetSpec(
        params=16, every=5, recycle=1.0, hysteresis=0.0, protect=0, cooldown=0.2, grow=grow
    )
    flow = RankFlow(model, spec, total_steps=60)
    (dead,) = (name for name, rank in flow.ranks.items() if rank == 0)
    missing = torch.outer(torch.randn(8), torch.randn(8))
    truths = {
        name: layer.base_layer.weight + missing * (name == dead) for name, layer in layers.items()
    }
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(60):
        x = torch.randn(64, 8)
        noisy = {name: x @ truth.T + 0.1 * torch.randn(64, 8) for name, truth in truths.items()}
        sum((layers[name](x) - y).square().mean() for name, y in noisy.items()).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        flow.step(optimizer)
    assert (flow.ranks[dead] == 1) is (grow == "gradient")
