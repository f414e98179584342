import copy
import logging

import numpy as np
import peft
import pytest
import torch
from torch import nn

from rankflow.adapters.base_weight import output_axis
from rankflow.adapters.newborns import along
from rankflow.adapters.sites import find_sites
from rankflow.importance.sketch import GradientSketch, solve
from rankflow.records import RankPlan
from rankflow.surgery import resize

YES, NO = torch.tensor(True), torch.tensor(False)
WIDTH = 8


def as_matrix(site, weight):
    """A base weight's gradient as (out, in)."""
    return weight.movedim(output_axis(site.layer), 0).flatten(1).double()


def dense_gradients(steered, batches):
    """G of every site, averaged over batches: under DoRA autograd's gradient of W is diag(c) G."""
    weights = [site.layer.get_base_layer().weight for site in steered.sites]
    for weight in weights:
        weight.requires_grad_()
    loss = sum(steered.loss(batch) for batch in batches) / len(batches)
    gradients = torch.autograd.grad(loss, weights)
    for weight in weights:
        weight.requires_grad_(False)
    return [as_matrix(site, g) for site, g in zip(steered.sites, gradients, strict=True)]


def rows_that_are_drawn(site):
    """The factor that a newborn's direction goes into, as rows."""
    return site.B.detach().T if site.kind == "embedding" else site.A.detach().flatten(1)


def best_directions(site, G, live=None):
    """Singular values and vectors, outside of live rows, by a dense decomposition."""
    G = G.T if site.kind == "embedding" else G
    if live is not None:
        G = G - G @ torch.linalg.pinv(live) @ live
    return torch.linalg.svd(G)[1:]


def assert_same_lines(actual, expected, tolerance=1e-6):
    """Equal up to the signs of the rows."""
    assert actual.shape == expected.shape
    signs = (actual * expected).sum(dim=1, keepdim=True).sign()
    torch.testing.assert_close(actual, signs * expected, rtol=0, atol=tolerance)


def sketch_of(sites, *, seed=0, event=0, width=WIDTH):
    sketch = GradientSketch(sites, width=width, seed=seed)
    sketch.open(sites, event)
    return sketch


@pytest.fixture
def sketched(steer):
    """A steered model, its sketch over two steps of two microbatches, and the dense gradients."""

    def make(**options):
        steered = steer(**options)
        sketch = sketch_of(steered.sites)
        batches = [steered.batch(step) for step in range(4)]
        for pair in (batches[:2], batches[2:]):
            for batch in pair:
                (steered.loss(batch) / 2).backward()
            sketch.observe(YES, 1.0)
        return steered, sketch, dense_gradients(steered, batches)

    return make


ALIVE = {"embed": 2, "fan": 1, "first": 3, "second": 1, "conv": 4}
DEAD = {"embed": 0, "fan": 0, "first": 0, "second": 0, "conv": 1}


# Against the dense gradient


@pytest.mark.parametrize("ranks", [ALIVE, DEAD], ids=["alive", "dead"])
def test_directions_are_the_singular_vectors_of_the_average_dense_gradient(
    ranks, sketched, use_dora
):
    steered, sketch, gradients = sketched(use_dora=use_dora, ranks=ranks)
    for i, (site, G) in enumerate(zip(steered.sites, gradients, strict=True)):
        _, rows = best_directions(site, G)
        assert_same_lines(sketch.directions(i, 2), rows[:2])


@pytest.mark.parametrize("ranks", [ALIVE, DEAD], ids=["alive", "dead"])
def test_the_energy_is_the_largest_singular_value_of_the_average(ranks, sketched, use_dora):
    _, sketch, gradients = sketched(use_dora=use_dora, ranks=ranks)
    expected = [torch.linalg.matrix_norm(G, ord=2) for G in gradients]
    torch.testing.assert_close(sketch.energy().double(), torch.stack(expected), rtol=1e-5, atol=0)


def test_directions_stay_away_from_live_rows_and_are_the_best_outside(sketched, use_dora):
    steered, sketch, gradients = sketched(use_dora=use_dora, ranks=ALIVE)
    for i, (site, G) in enumerate(zip(steered.sites, gradients, strict=True)):
        live = rows_that_are_drawn(site).double()
        _, rows = best_directions(site, G, live)
        found = sketch.directions(i, 1, live)
        assert_same_lines(found, rows[:1])
        assert (found @ live.T).abs().max() < 1e-12


def test_live_rows_may_be_repeated_or_zero(sketched):
    steered, sketch, gradients = sketched(ranks=ALIVE)
    first = steered.sites[2]
    live = first.A.detach()[:1]
    twice = torch.cat([live, live, torch.zeros_like(live)])
    _, rows = best_directions(first, gradients[2], live)
    assert_same_lines(sketch.directions(2, 3, twice), rows[:3])


def test_a_newborns_first_gradient_is_the_scaled_energy(sketched, use_dora):
    # b receives s G a: this is what decides that DoRA's factor m / n belongs into G.
    steered, sketch, _ = sketched(use_dora=use_dora, ranks=DEAD)
    energy = sketch.energy().double()
    births = np.array([1, 1, 1, 1, 0])
    keep = tuple(np.arange(site.rank) for site in steered.sites)
    newborns = along(sketch.directions, torch.Generator().manual_seed(0))
    resize(steered.sites, RankPlan(keep=keep, births=births), None, newborns)
    sketch.close()
    sum(steered.loss(steered.batch(step)) for step in range(4)).div(4).backward()
    for site, sigma in zip(steered.sites[:4], energy, strict=False):
        drawn, zero = (site.B, site.A) if site.kind == "embedding" else (site.A, site.B)
        expected = site.scale * sigma * drawn.detach().norm()
        torch.testing.assert_close(zero.grad.norm(), expected, rtol=1e-5, atol=0)


def decaying(seed, tokens=50, rows=40, columns=60):
    """Input and gradient of a layer whose G has the singular values 1, 1/2, 1/3, ..."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, 40, generator=generator, dtype=torch.float64)).Q
        for n in (rows, columns)
    )
    mixing = torch.linalg.qr(torch.randn(tokens, 40, generator=generator, dtype=torch.float64)).Q
    values = 1 / torch.arange(1, 41, dtype=torch.float64)
    return mixing @ right.T, (mixing * values) @ left.T, (left * values) @ right.T, right.T


def layer_site(adapt, dtype=torch.float64, rows=40, columns=60):
    model = adapt(nn.ModuleDict({"layer": nn.Linear(columns, rows)})).to(dtype)
    return find_sites(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_a_slowly_decaying_spectrum_the_first_directions_carry_almost_all_they_can(dtype, adapt):
    (site,) = sites = layer_site(adapt, dtype)
    shares, angles, energies = [], [], []
    for seed in range(10):
        x, delta, G, rows = decaying(seed)
        sketch = sketch_of(sites, seed=seed)
        site.layer(x.to(dtype)).backward(delta.to(dtype))
        sketch.observe(YES, 1.0)
        found = sketch.directions(0, 3)
        shares.append((G @ found.T).square().sum() / (1 + 1 / 4 + 1 / 9))
        angles.append((found[0] @ rows[0]).abs())
        energies.append(sketch.energy()[0])
    assert torch.stack(shares).mean() > 0.95  # of random directions: 0.02
    assert torch.stack(angles).min() > 0.97
    assert torch.stack(energies).double().mean().item() == pytest.approx(1, abs=0.05)


def test_the_factors_are_exact_up_to_the_sketchs_width():
    for rank in (1, 7, 8):
        G = torch.randn(30, rank).double() @ torch.randn(rank, 20).double()
        right, left = torch.randn(20, 8).double(), torch.randn(30, 32).double()
        Y = G @ right
        torch.testing.assert_close(Y @ solve(Y, left.T @ G, left), G)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_quantised_base_is_sketched_like_its_dequantised_weight(quant_type, adapt):
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(64, 32, quant_type=quant_type, compute_dtype=torch.float32)
    base = nn.ModuleDict({"layer": layer})
    base.is_loaded_in_4bit = True
    model = adapt(base.to("cpu"))
    (site,) = sites = find_sites(model)
    sketch = sketch_of(sites)
    x = torch.randn(5, 64)
    y = site.layer(x)
    delta = torch.randn_like(y)
    y.backward(delta)
    sketch.observe(YES, 1.0)
    _, rows = best_directions(site, (delta.T @ x).double())
    assert_same_lines(sketch.directions(0, 2), rows[:2], 1e-5)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to")
def test_transformers_are_sketched_at_every_layer(transformer, use_dora):
    config = peft.LoraConfig(r=2, use_dora=use_dora, target_modules="all-linear")
    model = peft.get_peft_model(transformer(), config).double()
    sites = find_sites(model)
    weights = [site.layer.get_base_layer().weight.requires_grad_() for site in sites]
    sketch = sketch_of(sites, width=16)
    tokens = torch.randint(3, 13, (1, 6))  # at most six tokens: the rank is below the width
    model(input_ids=tokens).logits.square().mean().backward()
    sketch.observe(YES, 1.0)
    energy = sketch.energy().double()
    for i, (site, weight) in enumerate(zip(sites, weights, strict=True)):
        if weight.grad is None:
            assert energy[i] == 0
            continue
        strengths, rows = best_directions(site, as_matrix(site, weight.grad))
        torch.testing.assert_close(energy[i], strengths[0], rtol=1e-5, atol=1e-12)
        if strengths[0] > 2 * strengths[1]:
            assert_same_lines(sketch.directions(i, 1), rows[:1], 1e-5)


# Which steps count


def test_a_step_that_is_not_accepted_leaves_no_trace(steer):
    steered = steer(ranks=ALIVE)
    sketch = sketch_of(steered.sites)
    steered.backward(0)
    sketch.observe(YES, 1.0)
    before = copy.deepcopy(sketch.state())
    (float("nan") * steered.loss(steered.batch(1))).backward()
    sketch.observe(NO, 1.0)
    assert all(torch.equal(t, before[key]) for key, t in sketch.state().items())
    steered.backward(0)
    sketch.observe(YES, 1.0)
    for key, tensor in sketch.state().items():
        torch.testing.assert_close(tensor, 2 * before[key])


def test_the_loss_scale_of_each_step_is_undone(steer):
    energies, directions = [], []
    for scales in ((1.0, 1.0), (1024.0, torch.tensor(0.5))):
        steered = steer(ranks=ALIVE)
        sketch = sketch_of(steered.sites)
        for step, scale in enumerate(scales):
            steered.backward(step, float(scale))
            sketch.observe(YES, scale)
        energies.append(sketch.energy())
        directions.append(sketch.directions(2, 2))
    torch.testing.assert_close(*energies)
    torch.testing.assert_close(*directions)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_gradient_that_is_seen_by_the_sketch_alone_leaves_no_trace(factor, adapt):
    """A dead site has no parameter whose gradient would tell that its own is not finite."""
    sites = layer_site(adapt) + layer_site(adapt)
    sketch = sketch_of(sites)
    x, delta, _, _ = decaying(0)

    def step(factors):
        for site, factor in zip(sites, factors, strict=True):
            site.layer(x).backward(factor * delta)
        sketch.observe(YES, 1.0)

    step((1.0, 1.0))
    before = copy.deepcopy(sketch.state())
    step((factor, 1.0))
    assert all(torch.equal(t, before[key]) for key, t in sketch.state().items())


def test_sums_that_overflow_give_no_direction_and_no_energy(adapt):
    sites = layer_site(adapt) + layer_site(adapt)
    sketch = sketch_of(sites)
    for site in sites:
        x, delta, _, _ = decaying(0)
        site.layer(x).backward(delta)
    sketch.observe(YES, 1.0)
    sketch.state()["0.Y"][0, 0] = float("inf")
    assert sketch.directions(0, 3).shape == (0, 60)
    assert sketch.directions(1, 3).shape == (3, 60)
    assert sketch.energy()[0] == 0
    assert sketch.energy()[1] > 0


@pytest.mark.parametrize("seen", [False, True])
def test_a_zero_gradient_gives_no_direction_and_no_energy(seen, adapt):
    (site,) = sites = layer_site(adapt)
    sketch = sketch_of(sites)
    if seen:
        site.layer(torch.randn(3, 60).double()).backward(torch.zeros(3, 40).double())
        sketch.observe(YES, 1.0)
    assert sketch.directions(0, 3).shape == (0, 60)
    assert sketch.energy().tolist() == [0]


def test_there_are_no_more_directions_than_the_gradient_has(adapt):
    (site,) = sites = layer_site(adapt)
    sketch = sketch_of(sites)
    x = torch.randn(2, 60).double()
    site.layer(x).backward(torch.randn(2, 40).double())
    sketch.observe(YES, 1.0)
    assert sketch.directions(0, 3).shape == (2, 60)
    assert sketch.directions(0, 3, x[:1]).shape == (1, 60)
    assert sketch.directions(0, 3, x).shape == (0, 60)


def test_the_largest_entry_of_a_direction_is_positive(adapt):
    # The sign of a singular vector is arbitrary, and rounding must not decide it.
    (site,) = sites = layer_site(adapt)
    for seed in range(4):
        sketch = sketch_of(sites, seed=seed)
        x, delta, _, _ = decaying(seed)
        site.layer(x).backward(delta)
        sketch.observe(YES, 1.0)
        found = sketch.directions(0, 4)
        assert torch.equal(found.amax(dim=1), found.abs().amax(dim=1))


# Opening, closing, state


def test_equal_seeds_give_equal_sketches_and_another_seed_or_event_another(adapt):
    states = []
    for seed, event in ((0, 0), (0, 0), (1, 0), (0, 1)):
        (site,) = sites = layer_site(adapt)
        sketch = sketch_of(sites, seed=seed, event=event)
        x, delta, _, _ = decaying(0)
        site.layer(x).backward(delta)
        sketch.observe(YES, 1.0)
        states.append((sketch.state()["0.Y"], sketch.directions(0, 2)))
    assert torch.equal(states[0][0], states[1][0])
    assert torch.equal(states[0][1], states[1][1])
    for other in states[2:]:
        assert not torch.isclose(states[0][0], other[0]).any()


def test_a_closed_sketch_costs_nothing_and_knows_nothing(steer):
    steered = steer()
    sketch = GradientSketch(steered.sites, width=WIDTH, seed=0)
    for _ in range(2):
        assert not sketch.is_open
        assert not any(site.layer._forward_hooks for site in steered.sites)
        assert sketch.state() == {}
        assert sketch.energy().tolist() == [0] * 5
        assert [sketch.directions(i, 2).shape for i in range(2)] == [(0, 6), (0, 6)]
        sketch.observe(YES, 1.0)
        sketch.open(steered.sites)
        assert sketch.is_open
        assert all(site.layer._forward_hooks for site in steered.sites)
        sketch.close()


def test_opening_again_starts_afresh(sketched):
    steered, sketch, _ = sketched()
    assert sketch.energy().max() > 0
    sketch.open(steered.sites)
    assert sketch.energy().max() == 0
    assert all(len(site.layer._forward_hooks) == 1 for site in steered.sites)


def test_a_restored_sketch_goes_on_like_the_one_that_was_saved(steer, use_dora):
    results = []
    for interrupted in (False, True):
        steered = steer(use_dora=use_dora)
        sketch = sketch_of(steered.sites, event=3)
        for step in range(4):
            steered.backward(step)
            sketch.observe(YES, 1.0)
            if interrupted and step == 1:
                saved = copy.deepcopy(sketch.state())
                sketch.close()
                sketch = sketch_of(steered.sites, event=3)
                sketch.load(saved)
        results.append([sketch.energy(), *(sketch.directions(i, 2) for i in range(5))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_mean_of_two_processes_is_the_sketch_of_the_whole_batch(steer):
    steered = steer()
    halves = []
    for step in (0, 1):
        sketch = sketch_of(steered.sites)
        steered.backward(step)
        sketch.observe(YES, 1.0)
        halves.append(copy.deepcopy(sketch.state()))
    sketch.load({key: (halves[0][key] + halves[1][key]) / 2 for key in halves[0]})
    for i, G in enumerate(dense_gradients(steered, [steered.batch(0), steered.batch(1)])):
        _, rows = best_directions(steered.sites[i], G)
        assert_same_lines(sketch.directions(i, 1), rows[:1])


@pytest.mark.parametrize("guarded", [False, True])
def test_a_compiled_model_is_sketched_if_its_hooks_are_guarded(guarded, adapt):
    (site,) = sites = layer_site(adapt)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=not guarded):
        compiled = torch.compile(nn.Sequential(site.layer), backend="eager")
        x, delta, _, _ = decaying(0)
        compiled(x).backward(delta)
        sketch = sketch_of(sites)
        compiled(x).backward(delta)
        sketch.observe(YES, 1.0)
    assert (sketch.energy()[0] > 0.5) == guarded  # without, the compiled code overlooks them


def test_a_sketch_that_sees_no_backward_pass_says_so_once(steer, caplog):
    steered = steer()
    sketch = sketch_of(steered.sites)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            sketch.observe(YES, 1.0)
        sketch.open(steered.sites)
        sketch.observe(YES, 1.0)
    assert [r.message.partition(",")[0] for r in caplog.records] == ["no backward pass was seen"]


def test_a_sketch_that_sees_backward_passes_is_silent(sketched, caplog):
    with caplog.at_level(logging.WARNING):
        sketched()
    assert caplog.records == []
