import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from rankflow import fairstart
from rankflow.adapters.newborns import orthogonal
from rankflow.adapters.sites import find_sites
from rankflow.errors import RankFlowError
from rankflow.fairstart import YOUTH, FairStart
from rankflow.records import RankPlan
from rankflow.surgery import resize

LR = 0.01


@pytest.fixture
def make_site(adapt):
    """A site of rank 2 on a linear layer (8, 7), in float64 unless told."""

    def make(dtype=torch.float64):
        torch.manual_seed(0)
        model = adapt(nn.ModuleDict({"layer": nn.Linear(7, 8)}), r=2).to(dtype)
        return find_sites(model)[0]

    return make


def give_birth(site, optimizer, fair, births, keep=None):
    keep = np.arange(site.rank) if keep is None else np.array(keep, dtype=np.int64)
    plan = RankPlan(keep=(keep,), births=np.array([births]))
    resize([site], plan, optimizer, orthogonal(torch.Generator().manual_seed(0)))
    fair.follow(plan)


def gradients_at(step, dtype=torch.float64):
    """Gradients of A and B for six components; each component's own, whatever the rank."""
    generator = torch.Generator().manual_seed(step)
    A = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    B = torch.randn(8, 6, generator=generator, dtype=torch.float64)
    return A.to(dtype), B.to(dtype)


def set_gradients(site, step, components):
    A, B = gradients_at(step, site.A.dtype)
    site.A.grad = A[components].clone()
    site.B.grad = B[:, components].clone()


def adam(value, gradients, betas, eps=1e-8, decay=0.0):
    """Adam of Kingma and Ba with decoupled weight decay, entry by entry with a count of its own."""
    value = value.double().clone()
    mean, square = torch.zeros_like(value), torch.zeros_like(value)
    path = []
    for step, gradient in enumerate(gradients, start=1):
        mean = betas[0] * mean + (1 - betas[0]) * gradient
        square = betas[1] * square + (1 - betas[1]) * gradient**2
        m, v = mean / (1 - betas[0] ** step), square / (1 - betas[1] ** step)
        value = value - LR * decay * value - LR * m / (v.sqrt() + eps)
        path.append(value)
    return path


def train(site, optimizer, steps, components):
    """Take steps on synthetic gradients; return A and B after each."""
    path = []
    for step in steps:
        set_gradients(site, step, components)
        optimizer.step()
        path.append((site.A.detach().clone(), site.B.detach().clone()))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {"foreach": False},
        {"foreach": True},
        {"fused": True},
        {"betas": (0.9, 0.95)},
        {"betas": (0.0, 0.99)},
        {"betas": (0.95, 0.9)},
        {"weight_decay": 0.5},
        {"eps": 1e-3},
    ],
    ids=str,
)
@pytest.mark.parametrize("late", [1, 12, 200])
def test_a_newborn_takes_the_steps_of_adam_with_a_count_of_its_own(late, options, make_site):
    site = make_site()
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, **{"weight_decay": 0.0, **options})
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(late), [0, 1])
    give_birth(site, optimizer, fair, 2)
    born = site.A.detach()[2:].clone(), site.B.detach()[:, 2:].clone()
    steps = range(late, late + YOUTH)
    path = train(site, optimizer, steps, [0, 1, 2, 3])

    settings = {
        "betas": options.get("betas", (0.9, 0.999)),
        "eps": options.get("eps", 1e-8),
        "decay": options.get("weight_decay", 0.0),
    }
    expected_A = adam(born[0], [gradients_at(s)[0][2:4] for s in steps], **settings)
    expected_B = adam(born[1], [gradients_at(s)[1][:, 2:4] for s in steps], **settings)
    for (A, B), a, b in zip(path, expected_A, expected_B, strict=True):
        torch.testing.assert_close(A[2:], a, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(B[:, 2:], b, rtol=1e-9, atol=1e-10)


def updates_of_a_newborn(site, late, *, corrected, count=60, **options):
    """Sizes of a newborn's updates over those of a fresh optimizer on the same gradients."""
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0, **options)
    fair = FairStart([site])
    if corrected:
        fair.attach(optimizer)
    train(site, optimizer, range(late), [0, 1])
    give_birth(site, optimizer, fair, 1)
    fresh = [
        nn.Parameter(site.A.detach()[2:].clone()),
        nn.Parameter(site.B.detach()[:, 2:].clone()),
    ]
    other = torch.optim.AdamW(fresh, lr=LR, weight_decay=0.0, **options)
    ratios = []
    for step in range(late, late + count):
        before = site.A.detach()[2:].clone(), fresh[0].detach().clone()
        set_gradients(site, step, [0, 1, 2])
        A, B = gradients_at(step, site.A.dtype)
        fresh[0].grad, fresh[1].grad = A[2:3].clone(), B[:, 2:3].clone()
        optimizer.step()
        other.step()
        mine, theirs = (site.A.detach()[2:] - before[0]), (fresh[0].detach() - before[1])
        ratios.append((mine.norm() / theirs.norm()).item())
    return ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("foreach", [False, True])
def test_the_first_updates_are_those_of_a_fresh_optimizer(foreach, dtype, make_site):
    ratios = updates_of_a_newborn(make_site(dtype), 200, corrected=True, foreach=foreach)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-9  # an update is a difference of weights
    assert ratios[:YOUTH] == pytest.approx([1.0] * YOUTH, rel=tolerance)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.9, 0.95), (0.8, 0.99)])
@pytest.mark.parametrize("late", [5, 40, 400])
def test_the_updates_stay_near_those_of_a_fresh_optimizer_when_grown_up(late, betas, make_site):
    ratios = updates_of_a_newborn(make_site(), late, corrected=True, betas=betas)
    assert all(1 / 1.5 < ratio < 1.5 for ratio in ratios)


def test_without_the_correction_a_late_newborn_takes_steps_many_times_too_long(make_site):
    ratios = updates_of_a_newborn(make_site(), 400, corrected=False)
    # (1 - beta1) / sqrt(1 - beta2) at once, with the shared correction of a late step near 1.
    assert ratios[0] == pytest.approx(0.1 / math.sqrt(0.001 / (1 - 0.999**401)), rel=1e-3)
    assert max(ratios) > 3


@pytest.mark.parametrize("foreach", [False, True])
def test_survivors_do_not_notice_the_newborns(foreach, make_site):
    paths = []
    for births in (0, 2):
        site = make_site()
        optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, foreach=foreach)
        fair = FairStart([site])
        fair.attach(optimizer)
        train(site, optimizer, range(50), [0, 1])
        give_birth(site, optimizer, fair, births)
        path = train(site, optimizer, range(50, 100), list(range(2 + births)))
        paths.append([(A[:2], B[:, :2]) for A, B in path])
    for (A, B), (other_A, other_B) in zip(*paths, strict=True):
        assert torch.equal(A, other_A)
        assert torch.equal(B, other_B)


def test_newborns_of_different_age_are_counted_apart(make_site):
    site = make_site()
    betas = (0.9, 0.999)
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(100), [0, 1])
    give_birth(site, optimizer, fair, 1)
    first = site.A.detach()[2:].clone()
    train(site, optimizer, range(100, 110), [0, 1, 2])
    give_birth(site, optimizer, fair, 2, keep=[1, 2])  # component 0 leaves
    assert fair.lived() == [[YOUTH, 10, 0, 0]]
    second = site.A.detach()[2:].clone()
    path = train(site, optimizer, range(110, 130), [1, 2, 3, 4])
    assert fair.lived() == [[YOUTH, 30, 20, 20]]
    expected = adam(first, [gradients_at(s)[0][2:3] for s in range(100, 130)], betas)[10:]
    for (A, _), a in zip(path, expected, strict=True):
        torch.testing.assert_close(A[1:2], a, rtol=1e-9, atol=1e-10)
    expected = adam(second, [gradients_at(s)[0][3:5] for s in range(110, 130)], betas)
    for (A, _), a in zip(path, expected, strict=True):
        torch.testing.assert_close(A[2:], a, rtol=1e-9, atol=1e-10)


def test_a_wholly_new_site_starts_with_a_fresh_state_and_needs_no_correction(make_site):
    site = make_site()
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(100), [0, 1])
    give_birth(site, optimizer, fair, 2, keep=[])
    assert fair.lived() == [[YOUTH, YOUTH]]
    born = site.A.detach().clone()
    path = train(site, optimizer, range(100, 120), [0, 1])
    expected = adam(born, [gradients_at(s)[0][:2] for s in range(100, 120)], (0.9, 0.999))
    for (A, _), a in zip(path, expected, strict=True):
        torch.testing.assert_close(A, a, rtol=1e-9, atol=1e-10)


def test_a_step_without_a_gradient_does_not_age_a_newborn(make_site):
    # Adam skips a parameter without a gradient, and does not count the step.
    site = make_site()
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(100), [0, 1])
    give_birth(site, optimizer, fair, 2)
    born = site.A.detach()[2:].clone()
    train(site, optimizer, range(100, 105), [0, 1, 2, 3])
    for _ in range(3):
        site.A.grad = site.B.grad = None
        optimizer.step()
    path = train(site, optimizer, range(105, 120), [0, 1, 2, 3])
    expected = adam(born, [gradients_at(s)[0][2:4] for s in range(100, 120)], (0.9, 0.999))[5:]
    for (A, _), a in zip(path, expected, strict=True):
        torch.testing.assert_close(A[2:], a, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "options",
    [{"amsgrad": True}, {"maximize": True}, {"weight_decay": 0.3, "decoupled_weight_decay": True}],
    ids=["amsgrad", "maximize", "decoupled decay"],
)
def test_other_forms_of_adam_give_a_newborn_the_updates_of_a_fresh_one(options, make_site):
    site = make_site()
    optimizer = torch.optim.Adam([site.A, site.B], lr=LR, **options)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(100), [0, 1])
    give_birth(site, optimizer, fair, 2)
    fresh = nn.Parameter(site.A.detach()[2:].clone())
    other = torch.optim.Adam([fresh], lr=LR, **options)
    for step in range(100, 100 + YOUTH):
        train(site, optimizer, [step], [0, 1, 2, 3])
        fresh.grad = gradients_at(step)[0][2:4].clone()
        other.step()
        torch.testing.assert_close(site.A.detach()[2:], fresh.detach(), rtol=1e-9, atol=1e-10)


def test_a_step_that_a_gradient_scaler_skips_leaves_a_newborns_state_alone(make_site):
    # A fused optimizer is called even when the scaler found an overflow, and skips inside.
    site = make_site(torch.float32)
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0, fused=True)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(100), [0, 1])
    give_birth(site, optimizer, fair, 1)
    train(site, optimizer, range(100, 103), [0, 1, 2])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(torch.zeros(()))  # a scaler makes its state at first use
    before = site.A.detach().clone(), optimizer.state[site.A]["exp_avg_sq"].clone()
    set_gradients(site, 103, [0, 1, 2])
    site.A.grad[2, 0] = float("inf")
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert torch.equal(site.A, before[0])
    assert torch.equal(optimizer.state[site.A]["exp_avg_sq"], before[1])
    assert fair.lived() == [[YOUTH, YOUTH, 3]]


def test_after_a_skipped_step_a_newborn_goes_on_as_if_it_had_not_been(make_site):
    ends = []
    for skipped in ((), (104, 105)):
        site = make_site(torch.float32)
        optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0, fused=True)
        fair = FairStart([site])
        fair.attach(optimizer)
        train(site, optimizer, range(100), [0, 1])
        give_birth(site, optimizer, fair, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        scaler.scale(torch.zeros(()))
        for step in [100, 101, 102, 103, *skipped, 106, 107]:
            set_gradients(site, step, [0, 1, 2])
            site.A.grad *= scaler.get_scale()
            site.B.grad *= scaler.get_scale()
            if step in skipped:
                site.A.grad.fill_(float("inf"))
            scaler.step(optimizer)
            scaler.update()
        assert fair.lived() == [[YOUTH, YOUTH, 6]]
        give_birth(site, optimizer, fair, 1)
        assert fair.lived() == [[YOUTH, YOUTH, 6, 0]]
        train(site, optimizer, range(108, 112), [0, 1, 2, 3])
        ends.append(site.A.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_a_scaled_step_of_a_fused_optimizer_is_that_of_the_plain_one(unscale_first, make_site):
    ends = []
    for scale in (1.0, 1024.0):
        site = make_site(torch.float32)
        optimizer = torch.optim.AdamW([site.A, site.B], lr=LR, weight_decay=0.0, fused=True)
        fair = FairStart([site])
        fair.attach(optimizer)
        train(site, optimizer, range(100), [0, 1])
        give_birth(site, optimizer, fair, 1)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(torch.zeros(()))
        for step in range(100, 110):
            set_gradients(site, step, [0, 1, 2])
            site.A.grad *= scale
            site.B.grad *= scale
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        ends.append(site.A.detach().clone())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)


def change_betas(site, optimizer):
    optimizer.param_groups[0]["betas"] = (0.8, 0.99)
    return optimizer


def load_the_state(site, optimizer):
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


def move_the_weights(site, optimizer):
    for parameter in (site.A, site.B):
        parameter.data = parameter.data.clone()
    return optimizer


def make_another(site, optimizer):
    groups = [{"params": [site.B], "betas": (0.8, 0.9)}, {"params": [site.A]}]
    return torch.optim.AdamW(groups, lr=LR)


@pytest.mark.parametrize("disturb", [change_betas, load_the_state, move_the_weights, make_another])
def test_nothing_that_is_remembered_between_events_is_out_of_date(disturb, make_site):
    ends = []
    for forgets in (True, False):
        site = make_site()
        optimizer = torch.optim.AdamW([site.A, site.B], lr=LR)
        fair = FairStart([site])
        fair.attach(optimizer)
        train(site, optimizer, range(100), [0, 1])
        give_birth(site, optimizer, fair, 2)
        train(site, optimizer, range(100, 105), [0, 1, 2, 3])
        trained_by = disturb(site, optimizer)
        if trained_by is not optimizer:
            fair.attach(trained_by)
        for step in range(105, 110):
            if forgets:
                fair.resume(fair.lived())
            train(site, trained_by, [step], [0, 1, 2, 3])
        ends.append((site.A.detach(), site.B.detach()))
    assert all(map(torch.equal, *ends))


def test_the_first_steps_of_a_newborn_are_not_captured_into_a_graph(make_site, monkeypatch):
    site = make_site()
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR)
    fair = FairStart([site])
    fair.attach(optimizer)
    monkeypatch.setattr(fairstart, "is_capturing", lambda tensor: True)
    train(site, optimizer, range(3), [0, 1])
    give_birth(site, optimizer, fair, 1)
    with pytest.raises(RankFlowError, match="captured into a CUDA graph while components are y"):
        train(site, optimizer, [3], [0, 1, 2])


# --- which optimizer, and how long


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9),
        lambda p: torch.optim.RMSprop(p, lr=LR),
        lambda p: torch.optim.Adafactor(p, lr=LR),
    ],
    ids=["SGD", "RMSprop", "Adafactor"],
)
def test_optimizers_without_a_shared_correction_are_left_alone(make, make_site):
    paths = []
    for attached in (False, True):
        site = make_site()
        optimizer = make([site.A, site.B])
        fair = FairStart([site])
        if attached:
            fair.attach(optimizer)
        train(site, optimizer, range(10), [0, 1])
        give_birth(site, optimizer, fair, 1)
        paths.append(train(site, optimizer, range(10, 20), [0, 1, 2])[-1])
    assert torch.equal(paths[0][0], paths[1][0])
    assert torch.equal(paths[0][1], paths[1][1])


def test_momentum_of_sgd_starts_a_newborn_as_at_step_zero(make_site):
    site = make_site()
    optimizer = torch.optim.SGD([site.A, site.B], lr=LR, momentum=0.9)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(50), [0, 1])
    give_birth(site, optimizer, fair, 1)
    fresh = nn.Parameter(site.A.detach()[2:].clone())
    other = torch.optim.SGD([fresh], lr=LR, momentum=0.9)
    for step in range(50, 70):
        train(site, optimizer, [step], [0, 1, 2])
        fresh.grad = gradients_at(step)[0][2:3].clone()
        other.step()
        torch.testing.assert_close(site.A.detach()[2:], fresh.detach(), rtol=1e-12, atol=0)


def test_mature_components_are_never_corrected(make_site):
    paths = []
    for attached in (False, True):
        site = make_site()
        optimizer = torch.optim.AdamW([site.A, site.B], lr=LR)
        fair = FairStart([site])
        if attached:
            fair.attach(optimizer)
        paths.append(train(site, optimizer, range(40), [0, 1]))
    assert all(torch.equal(a[0], b[0]) for a, b in zip(*paths, strict=True))
    assert fair.lived() == [[YOUTH, YOUTH]]


def test_a_newborn_that_has_grown_up_is_left_alone_and_counted_no_more(make_site):
    site = make_site()
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR)
    fair = FairStart([site])
    fair.attach(optimizer)
    train(site, optimizer, range(100), [0, 1])
    give_birth(site, optimizer, fair, 1)
    for step in range(100, 102 + YOUTH):
        train(site, optimizer, [step], [0, 1, 2])
        gradient = gradients_at(step)[0][:3]
        is_corrected = not torch.equal(site.A.grad, gradient)
        assert is_corrected == (step < 100 + YOUTH)
    assert fair.lived() == [[YOUTH] * 3]


def test_attaching_again_does_not_correct_twice(make_site):
    ends = []
    for times in (1, 3):
        site = make_site()
        optimizer = torch.optim.AdamW([site.A, site.B], lr=LR)
        fair = FairStart([site])
        for _ in range(times):
            fair.attach(optimizer)
        train(site, optimizer, range(20), [0, 1])
        give_birth(site, optimizer, fair, 1)
        ends.append(train(site, optimizer, range(20, 30), [0, 1, 2])[-1][0])
        assert fair.lived() == [[YOUTH, YOUTH, 10]]
    assert torch.equal(*ends)


def test_a_closed_correction_leaves_the_optimizer_alone(make_site):
    site = make_site()
    optimizer = torch.optim.AdamW([site.A, site.B], lr=LR)
    fair = FairStart([site])
    fair.attach(optimizer)
    fair.close()
    train(site, optimizer, range(20), [0, 1])
    give_birth(site, optimizer, fair, 1)
    train(site, optimizer, range(20, 25), [0, 1, 2])
    assert fair.lived() == [[YOUTH, YOUTH, 0]]
    fair.restart()
    assert fair.lived() == [[YOUTH] * 3]
