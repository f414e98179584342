"""What every scorer must do, whatever it measures."""

from typing import get_args

import numpy as np
import pytest
import torch
from torch import nn

from rankflow.adapters.newborns import orthogonal
from rankflow.adapters.savepoint import Savepoint
from rankflow.importance.registry import make_scorer
from rankflow.records import RankPlan
from rankflow.specs.budget import Score
from rankflow.surgery import resize

SCORES = get_args(Score)
FROM_GRADIENTS = ("sensitivity", "taylor", "fisher")
AVERAGED = (*FROM_GRADIENTS, "frobenius")

# Clipping is undone by a ratio of float32 norms.
ROUNDING = {"rtol": 1e-5, "atol": 0.0}


@pytest.fixture(params=SCORES)
def score(request):
    return request.param


def score_of(name, sites):
    return make_scorer(name, sites, decay=0.8, seed=0)


def train(steered, scorer, gradients, steps, between=lambda parameters: None):
    """Observe some steps; ``between`` happens to the gradients after backward."""
    for step in steps:
        steered.backward(step)
        between([p for p in steered.model.parameters() if p.grad is not None])
        steered.observe(scorer, gradients)
        steered.drift(step)
    return scorer.read().clone()


def test_scores_are_finite_nonnegative_and_one_a_component(score, steer, watch, use_dora):
    steered = steer(use_dora=use_dora, dtype=torch.float32)
    scores = train(steered, score_of(score, steered.sites), watch(steered.sites), range(3))
    assert scores.shape == (10,)
    assert torch.isfinite(scores).all()
    assert (scores > 0).all()


def test_equal_runs_give_equal_scores(score, steer, watch):
    runs = []
    for _ in range(2):
        steered = steer(dtype=torch.float32)
        runs.append(train(steered, score_of(score, steered.sites), watch(steered.sites), range(3)))
    assert torch.equal(*runs)


def test_observing_changes_no_weight_and_no_gradient(score, steer, watch, use_dora):
    steered = steer(use_dora=use_dora)
    scorer, gradients = score_of(score, steered.sites), watch(steered.sites)
    steered.backward(0)
    tensors = {n: (p.clone(), p.grad) for n, p in steered.model.named_parameters()}
    copies = {n: None if g is None else g.clone() for n, (_, g) in tensors.items()}
    steered.observe(scorer, gradients)
    for name, p in steered.model.named_parameters():
        assert torch.equal(p, tensors[name][0])
        assert p.grad is tensors[name][1]
        assert p.grad is None or torch.equal(p.grad, copies[name])


def test_following_a_resize_can_be_undone(score, steer, watch):
    steered = steer()
    scorer = score_of(score, steered.sites)
    train(steered, scorer, watch(steered.sites), range(2))
    scores = scorer.read()
    copies = {key: tensor.clone() for key, tensor in scorer.state().items()}
    ranks = np.array([site.rank for site in steered.sites])
    keep = tuple(np.arange(max(rank - 1, 0)) for rank in ranks)
    plan = RankPlan(keep, np.full(len(ranks), 1))
    before = Savepoint(steered.sites, others=[scorer])
    newborns = orthogonal(torch.Generator().manual_seed(0))
    resize(steered.sites, plan, None, newborns, before=before)
    scorer.reindex(steered.sites, torch.from_numpy(plan.sources(ranks)), before)
    before.restore()
    assert torch.equal(scorer.read(), scores)
    for key, tensor in scorer.state().items():
        assert torch.equal(tensor, copies[key])


@pytest.mark.parametrize("score", AVERAGED)
def test_clipping_makes_no_difference(score, steer, watch):
    plain = steer()
    expected = train(plain, score_of(score, plain.sites), watch(plain.sites), range(4))
    clipped = steer()
    norms = iter([1e-4, 1e9, 1e-2, 1e-6])

    def clip(parameters):
        nn.utils.clip_grad_norm_(parameters, next(norms))

    scores = train(clipped, score_of(score, clipped.sites), watch(clipped.sites), range(4), clip)
    torch.testing.assert_close(scores, expected, **ROUNDING)


@pytest.mark.parametrize("score", FROM_GRADIENTS)
def test_accumulated_micro_batches_score_like_the_whole_batch(score, steer, watch):
    whole = steer()
    expected = train(whole, score_of(score, whole.sites), watch(whole.sites), range(3))
    split = steer()
    scorer, gradients = score_of(score, split.sites), watch(split.sites)
    for step in range(3):
        split.model.zero_grad(set_to_none=True)
        tokens, target = split.batch(step)
        for rows in (slice(0, 1), slice(1, 4)):
            part = tokens[rows], target[rows]
            (split.loss(part) * len(part[0]) / 4).backward()
        nn.utils.clip_grad_norm_(split.model.parameters(), 1e-3)
        split.observe(scorer, gradients)
        split.drift(step)
    torch.testing.assert_close(scorer.read(), expected, **ROUNDING)


@pytest.mark.parametrize("score", FROM_GRADIENTS)
def test_a_scaled_loss_scores_like_the_plain_one(score, steer, watch):
    plain = steer()
    expected = train(plain, score_of(score, plain.sites), watch(plain.sites), range(3))
    scaled = steer()
    scorer, gradients = score_of(score, scaled.sites), watch(scaled.sites)
    for step, scale in enumerate((65536.0, 65536.0, 32768.0)):
        scaled.backward(step, scale=scale)
        held = [p for p in scaled.model.parameters() if p.grad is not None]
        for p in held:
            p.grad /= scale
        nn.utils.clip_grad_norm_(held, 1e-2)
        scaled.observe(scorer, gradients, loss_scale=torch.tensor(scale))
        scaled.drift(step)
    torch.testing.assert_close(scorer.read(), expected, **ROUNDING)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(value, score, steer, watch, use_dora):
    plain = steer(use_dora=use_dora)
    scorer, gradients = score_of(score, plain.sites), watch(plain.sites)
    before = train(plain, scorer, gradients, range(2))
    state = {key: tensor.clone() for key, tensor in scorer.state().items()}
    plain.backward(7, scale=value)
    plain.observe(scorer, gradients)
    assert all(torch.equal(scorer.state()[key], state[key]) for key in state)
    if score != "norm":  # which looks at the weights as they are
        assert torch.equal(scorer.read(), before)
    after = train(plain, scorer, gradients, range(2, 4))
    other = steer(use_dora=use_dora)
    expected = train(other, score_of(score, other.sites), watch(other.sites), range(4))
    assert torch.equal(after, expected)


def test_a_saved_state_goes_on_as_if_there_had_been_no_break(score, steer, watch):
    first = steer()
    scorer, gradients = score_of(score, first.sites), watch(first.sites)
    train(first, scorer, gradients, range(3))
    state = {key: tensor.clone() for key, tensor in scorer.state().items()}
    second = make_scorer(score, first.sites, decay=0.8, seed=99)
    second.load(state)
    if score != "norm":
        assert torch.equal(second.read(), scorer.read())
    first.backward(3)
    reading = gradients.read()
    for each in (scorer, second):
        each.observe(reading.unclip, reading.accept)
    assert torch.equal(second.read(), scorer.read())
    sources = torch.tensor([0, 1, -1, 2, 3, 4, 5, 6, 7, 8, 9])
    grow(first, np.array([0, 1, 0, 0, 0]))
    for each in (scorer, second):
        each.reindex(first.sites, sources)
    assert torch.equal(second.read(), scorer.read())


def test_a_saved_state_does_not_change_with_the_run(score, steer, watch):
    steered = steer()
    scorer, gradients = score_of(score, steered.sites), watch(steered.sites)
    train(steered, scorer, gradients, range(2))
    state = scorer.state()
    assert set(state) == set(score_of(score, steered.sites).state())
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def grow(steered, births, keep=None):
    keep = [np.arange(site.rank) for site in steered.sites] if keep is None else keep
    plan = RankPlan(keep=tuple(keep), births=births)
    resize(steered.sites, plan, None, orthogonal(torch.Generator().manual_seed(0)))
    return plan


MIXED_PLAN = {  # ranks 2, 0, 3, 1, 4 become 1, 2, 2, 0, 3
    "keep": [np.array([1]), np.array([], int), np.array([0, 2]), np.array([], int), np.array([3])],
    "births": np.array([0, 2, 0, 0, 2]),
}
NEWBORN = [False, True, True, False, False, False, True, True]
SURVIVORS = [1, 2, 4, 9]


@pytest.mark.parametrize("score", AVERAGED)
def test_survivors_keep_their_score_and_newborns_start_at_zero(score, steer, watch, use_dora):
    steered = steer(use_dora=use_dora)
    scorer, gradients = score_of(score, steered.sites), watch(steered.sites)
    before = train(steered, scorer, gradients, range(3))
    ranks = np.array([site.rank for site in steered.sites])
    plan = grow(steered, MIXED_PLAN["births"], MIXED_PLAN["keep"])
    scorer.reindex(steered.sites, torch.from_numpy(plan.sources(ranks)))
    after = scorer.read()
    newborn = torch.tensor(NEWBORN)
    assert torch.equal(after[~newborn], before[SURVIVORS])
    assert (after[newborn] == 0).all()


@pytest.mark.parametrize("score", FROM_GRADIENTS)
def test_after_a_resize_every_component_goes_on_with_its_own_history(score, steer, watch):
    steered = steer()
    scorer, gradients = score_of(score, steered.sites), watch(steered.sites)
    train(steered, scorer, gradients, range(3))
    old_state = scorer.read().clone()
    ranks = np.array([site.rank for site in steered.sites])
    plan = grow(steered, MIXED_PLAN["births"], MIXED_PLAN["keep"])
    scorer.reindex(steered.sites, torch.from_numpy(plan.sources(ranks)))
    gradients.watch(steered.sites)
    for site in steered.sites:
        site.B.data += 0.1  # so that newborns have gradients too
    fresh = score_of(score, steered.sites)
    for step in range(3, 6):
        steered.backward(step)
        reading = gradients.read()
        for each in (scorer, fresh):
            each.observe(reading.unclip, reading.accept)
        steered.drift(step)
    newborn = torch.tensor(NEWBORN)
    torch.testing.assert_close(scorer.read()[newborn], fresh.read()[newborn])
    assert (old_state > 0).all()
    assert not torch.isclose(scorer.read()[~newborn], fresh.read()[~newborn], atol=0).any()


def test_a_score_follows_a_resize_to_nothing_and_back(score, steer, watch):
    steered = steer()
    scorer, gradients = score_of(score, steered.sites), watch(steered.sites)
    train(steered, scorer, gradients, range(2))
    nothing = [np.array([], int)] * 5
    grow(steered, np.zeros(5, int), nothing)
    scorer.reindex(steered.sites, torch.zeros(0, dtype=torch.long))
    assert scorer.read().shape == (0,)
    scorer.observe(torch.ones(()), torch.tensor(True))
    grow(steered, np.ones(5, int), nothing)
    scorer.reindex(steered.sites, torch.full((5,), -1))
    gradients.watch(steered.sites)
    for site in steered.sites:
        site.A.data += 0.1
        site.B.data += 0.1
    scores = train(steered, scorer, gradients, range(2))
    assert (scores > 0).all()


# --- no host synchronisation


def test_the_meta_device_refuses_what_would_wait_for_the_host():
    # The test below rests on this: a tensor without data cannot be read by the host.
    tensor = torch.zeros(3, device="meta")
    for read in (tensor[0].item, tensor.tolist, tensor.cpu, tensor.nonzero):
        with pytest.raises((RuntimeError, NotImplementedError)):
            read()
    with pytest.raises(RuntimeError):
        bool(tensor.sum() > 0)


def test_observing_never_waits_for_the_device(score, steer, watch, use_dora):
    steered = steer(use_dora=use_dora, dtype=torch.float32)
    steered.model.to("meta")
    assert {p.device.type for p in steered.model.parameters()} == {"meta"}
    scorer, gradients = score_of(score, steered.sites), watch(steered.sites)
    tokens = torch.zeros(2, 4, dtype=torch.long, device="meta")
    for scale in (1.0, torch.ones((), device="meta")):
        steered.model(tokens).square().mean().backward()
        nn.utils.clip_grad_norm_(steered.model.parameters(), 1.0)
        reading = gradients.read(scale)
        scorer.observe(reading.unclip, reading.accept)
        assert reading.accept.device.type == reading.unclip.device.type == "meta"
    assert scorer.read().device.type == "meta"
