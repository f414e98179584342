import pytest
import torch
from torch import nn

from rankflow.adapters.sites import find_sites
from rankflow.errors import SpecError
from rankflow.importance.magnitudes import change_of_magnitudes, make_magnitude_scorer
from rankflow.importance.registry import make_scorers
from rankflow.specs.budget import BudgetSpec, load_budget

YES, ONE = torch.tensor(True), torch.ones(())
SCORES = ["taylor", "fisher", "sensitivity", "norm", "tangential", "random", "uniform"]
OFF = 2  # the site "first", whose magnitude is off


def make(name, sites, *, decay=0.0, seed=0):
    return make_magnitude_scorer(name, sites, decay=decay, seed=seed)


def turn_off(site):
    site.install(site.A, site.B, magnitude=nn.Parameter(site.magnitude.detach().new_empty(0)))


def turn_on(site, values):
    site.install(site.A, site.B, magnitude=nn.Parameter(values))


@pytest.fixture
def steered(steer):
    """All kinds of layers, one of them dead, one with its magnitude off, all others trained."""
    made = steer(use_dora=True)
    for i, site in enumerate(made.sites):
        generator = torch.Generator().manual_seed(i)
        site.magnitude.data *= 1 + 0.5 * torch.rand(
            site.magnitude.shape, generator=generator, dtype=torch.float64
        )
    turn_off(made.sites[OFF])
    return made


def drift(steered, step):
    """Move all weights and magnitudes, as an optimizer would."""
    steered.drift(step)
    for site in steered.sites:
        if site.magnitude is not None:
            noise = torch.randn(
                site.magnitude.shape, generator=torch.Generator().manual_seed(step)
            ).double()
            site.magnitude.data += 0.05 * noise


def norms(steered, site):
    return steered.factors(site)[1].norm(dim=1)


def gates_by_autograd(steered, batch):
    """dL/dg with a real gate, m = n + g (m - n) and n held fixed, at every magnitude."""
    names = {id(p): name for name, p in steered.model.named_parameters()}
    gates = [torch.ones((), dtype=torch.float64, requires_grad=True) for _ in steered.sites]
    gated = {}
    for site, gate in zip(steered.sites, gates, strict=True):
        if site.magnitude is not None:
            m, n = site.magnitude.detach(), norms(steered, site).view(site.magnitude.shape)
            gated[names[id(site.magnitude)]] = n + gate * (m - n)
    tokens, target = batch
    out = torch.func.functional_call(steered.model, gated, (tokens,))
    (out - target).square().mean().backward()
    zero = torch.zeros((), dtype=torch.float64)
    return torch.stack([zero if gate.grad is None else gate.grad for gate in gates])


@pytest.mark.parametrize("decay", [0.0, 0.8])
def test_scores_are_moments_of_the_gradient_of_a_real_gate(decay, steered):
    taylor, fisher = (make(name, steered.sites, decay=decay) for name in ("taylor", "fisher"))
    squares = []
    for step in range(5):
        squares.append(gates_by_autograd(steered, steered.batch(step)) ** 2)
        steered.backward(step)
        for scorer in (taylor, fisher):
            scorer.observe(ONE, YES)
        drift(steered, step)
    weights = torch.tensor([decay ** (4 - i) for i in range(5)], dtype=torch.float64)
    expected = (weights / weights.sum()) @ torch.stack(squares)
    assert expected[OFF] == 0
    assert (expected > 0).sum() == 4
    torch.testing.assert_close(taylor.read().double(), expected.sqrt(), rtol=1e-5, atol=0)
    torch.testing.assert_close(fisher.read().double(), expected / 2, rtol=1e-5, atol=0)


@pytest.mark.parametrize("rank", [3, 0])
def test_a_gate_in_the_dense_formula_has_that_gradient(rank, layer_case, host, adapt, change_ranks):
    model = adapt(host(layer_case), use_dora=True).double()
    (site,) = find_sites(model)
    change_ranks(site, rank)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    model(x).pow(3).sum().backward()
    scorer = make("taylor", [site])
    scorer.observe(ONE, YES)

    base = site.layer.get_base_layer()
    V = layer_case.matrix(base.weight.detach())
    V = V + site.scale * (site.B.detach().flatten(1) @ site.A.detach().flatten(1))
    gate = torch.ones((), dtype=torch.float64, requires_grad=True)
    n = V.norm(dim=1)
    m = n + gate * (site.magnitude.detach().flatten() - n)
    weight = layer_case.weight_like((m / n)[:, None] * V, base.weight)
    bias = getattr(base, "bias", None)
    out = layer_case.apply(base, x, weight, None if bias is None else bias.detach())
    out.pow(3).sum().backward()
    torch.testing.assert_close(scorer.read().double(), gate.grad.abs().view(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("decay", [0.5, 0.85])
def test_sensitivity_is_the_mean_over_the_entries_of_adaloras_product(decay, steered):
    scorer = make("sensitivity", steered.sites, decay=decay)
    means = [0.0] * 5
    spreads = [0.0] * 5
    for step in range(4):
        steered.backward(step)
        scorer.observe(ONE, YES)
        for i, site in enumerate(steered.sites):
            if site.magnitude is not None:
                move = site.magnitude.detach().flatten() - norms(steered, site)
                now = (move * site.magnitude.grad.flatten()).abs()
                means[i] = decay * means[i] + (1 - decay) * now
                spreads[i] = decay * spreads[i] + (1 - decay) * (now - means[i]).abs()
        drift(steered, step)
    expected = [
        0.0 if i == OFF else (mean * spread).mean().item()
        for i, (mean, spread) in enumerate(zip(means, spreads, strict=True))
    ]
    # Both averages are float32, and the spread is a difference of near numbers.
    torch.testing.assert_close(scorer.read().tolist(), expected, rtol=1e-4, atol=0)
    assert sum(value > 0 for value in expected) == 4


@pytest.mark.parametrize(("name", "power"), [("norm", 1), ("tangential", 2), ("uniform", 0)])
def test_the_size_is_that_of_the_change_of_the_dense_weight(name, power, steered):
    expected = []
    for site in steered.sites:
        factors, V = steered.factors(site)
        expected.append(((factors - 1)[:, None] * V).norm().item() ** power)
    expected[OFF] = 0.0
    read = make(name, steered.sites).read()
    torch.testing.assert_close(read.tolist(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", SCORES)
def test_a_row_of_zeros_counts_for_nothing(name, steered):
    site = steered.sites[3]
    scores = []
    for magnitude in (0.0, 30.0):
        site.layer.get_base_layer().weight.data[1] = 0
        site.B.data[1] = 0
        site.magnitude.data[1] = magnitude
        scorer = make(name, steered.sites)
        steered.model.zero_grad()
        for other in steered.sites:
            if other.magnitude is not None:
                other.magnitude.grad = torch.ones_like(other.magnitude)
        scorer.observe(ONE, YES)
        scores.append(scorer.read())
    assert torch.isfinite(scores[0]).all()
    assert torch.equal(*scores)


@pytest.mark.parametrize("name", [name for name in SCORES if name != "random"])
def test_a_magnitude_that_is_off_scores_zero_and_every_other_more(name, steered):
    scorer = make(name, steered.sites, decay=0.5)
    for step in range(2):
        steered.backward(step)
        scorer.observe(ONE, YES)
        drift(steered, step)
    scores = scorer.read()
    assert scores.shape == (5,)
    assert scores[OFF] == 0
    assert (scores[[0, 1, 3, 4]] > 0).all()


@pytest.mark.parametrize("name", SCORES)
def test_every_magnitude_may_be_off(name, steered):
    for site in steered.sites:
        if site.magnitude is not None:
            turn_off(site)
    scorer = make(name, steered.sites)
    steered.backward(0)
    scorer.observe(ONE, YES)
    scores = scorer.read()
    assert scores.shape == (5,)
    assert name == "random" or not scores.any()


@pytest.mark.parametrize(("name", "power"), [("taylor", 1), ("fisher", 2), ("sensitivity", 2)])
def test_clipping_is_undone(name, power, steered, watch):
    gradients = watch(steered.sites)
    scores = []
    for scale in (1.0, 1e-3):
        scorer = make(name, steered.sites, decay=0.5)
        for step in range(2):
            steered.backward(step)
            for p in steered.model.parameters():
                if p.grad is not None:
                    p.grad *= scale
            steered.observe(scorer, gradients)
        scores.append(scorer.read())
    assert scores[0].any()
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=0)
    clipped = make(name, steered.sites, decay=0.5)
    plain = make(name, steered.sites, decay=0.5)
    for step in range(2):
        steered.backward(step)
        plain.observe(ONE, YES)
        clipped.observe(torch.tensor(3.0), YES)
    torch.testing.assert_close(clipped.read(), 3**power * plain.read(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["taylor", "fisher", "sensitivity"])
def test_a_step_that_is_not_finite_is_ignored(name, steered, watch):
    gradients = watch(steered.sites)
    scorer = make(name, steered.sites, decay=0.5)
    steered.backward(0)
    steered.observe(scorer, gradients)
    before = scorer.read().clone()
    steered.backward(1)
    steered.sites[0].magnitude.grad[0] = float("nan")
    steered.observe(scorer, gradients)
    assert torch.equal(scorer.read(), before)
    assert before.any()


@pytest.mark.parametrize("name", ["taylor", "fisher", "sensitivity"])
def test_scores_follow_magnitudes_that_come_go_and_stay(name, steered):
    scorer = make(name, steered.sites, decay=0.5)
    for step in range(3):
        steered.backward(step)
        scorer.observe(ONE, YES)
    before = scorer.read().clone()
    turn_off(steered.sites[0])
    turn_on(steered.sites[OFF], torch.rand(5, dtype=torch.float64) + 1)
    scorer.reindex(steered.sites, torch.tensor([-1, 1, -1, 3, 4]))
    assert torch.equal(scorer.read(), before * torch.tensor([0, 1, 0, 1, 1]))
    steered.backward(3)
    fresh = make(name, steered.sites, decay=0.5)
    for each in (scorer, fresh):
        each.observe(ONE, YES)
    assert scorer.read()[0] == 0
    # A new magnitude is judged on its own life, whatever the others have seen.
    torch.testing.assert_close(scorer.read()[OFF], fresh.read()[OFF], rtol=1e-5, atol=0)
    assert scorer.read()[OFF] > 0
    assert not torch.isclose(scorer.read()[1], fresh.read()[1], rtol=1e-3, atol=0)
    before = scorer.read().clone()
    scorer.reindex(steered.sites, torch.tensor([-1, 1, 2, -1, 4]))  # as long as the last site's
    assert torch.equal(scorer.read(), before * torch.tensor([0, 1, 1, 0, 1]))


@pytest.mark.parametrize("name", SCORES)
def test_a_restored_scorer_goes_on_where_the_first_one_stood(name, steered):
    first = make(name, steered.sites, decay=0.5)
    for step in range(2):
        steered.backward(step)
        first.observe(ONE, YES)
    state = {key: value.clone() for key, value in first.state().items()}
    second = make(name, steered.sites, decay=0.5, seed=99)
    second.load(state)
    for each in (first, second):
        steered.backward(2)
        each.observe(ONE, YES)
        each.reindex(steered.sites, torch.tensor([0, -1, -1, 3, 4]))
    assert torch.equal(first.read(), second.read())


def test_random_magnitudes_draw_other_numbers_than_random_components(steered):
    scorers = make_scorers(BudgetSpec(rank=2, score="random", magnitude="budgeted"), steered.sites)
    assert list(scorers) == ["components", "magnitudes"]
    numbers = [set(scorer.read().tolist()) for scorer in scorers.values()]
    assert [len(some) for some in numbers] == [10, 5]
    assert not numbers[0] & numbers[1]


@pytest.mark.parametrize("magnitude", ["always", "never"])
def test_only_budgeted_magnitudes_are_scored(magnitude, steered):
    assert list(make_scorers(BudgetSpec(rank=2, magnitude=magnitude), steered.sites)) == [
        "components"
    ]


def test_a_share_of_the_site_says_nothing_of_magnitudes_and_is_refused(steered):
    with pytest.raises(SpecError, match=r"says nothing of a magnitude; set score = 'taylor'"):
        load_budget("reallocate", rank=2, score="frobenius", magnitude="budgeted")
    with pytest.raises(SpecError, match="'frobenius' says nothing of magnitudes; use 'taylor'"):
        make("frobenius", steered.sites)


def test_the_change_of_a_magnitude_is_its_mean_distance_from_the_norm_as_a_share_of_it(steered):
    changes = change_of_magnitudes(steered.sites)
    for change, site in zip(changes, steered.sites, strict=True):
        if site.magnitude is None:
            assert change == 0
        else:
            n = norms(steered, site)
            expected = ((site.magnitude.flatten() - n).abs() / n).mean()
            assert expected > 0.1
            assert change == pytest.approx(expected.item(), rel=1e-6)
