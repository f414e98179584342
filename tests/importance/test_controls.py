import torch

from rankflow.importance.controls import RandomScore, UniformScore

CPU = torch.device("cpu")


def test_random_scores_lie_above_zero_and_differ():
    scores = RandomScore(10, 0, CPU).read()
    assert scores.shape == (10,)
    assert ((scores > 0) & (scores <= 1)).all()
    assert len(set(scores.tolist())) == 10


def test_random_scores_depend_on_nothing_but_the_seed():
    first = RandomScore(10, 3, CPU).read()
    torch.rand(5)  # the global generator has no say
    assert torch.equal(RandomScore(10, 3, CPU).read(), first)
    assert not torch.equal(RandomScore(10, 4, CPU).read(), first)


def test_newborns_draw_numbers_that_no_one_had(steer):
    steered = steer()
    scorer = RandomScore(10, 0, CPU)
    before = scorer.read().clone()
    scorer.reindex(steered.sites, torch.tensor([4, -1, 0, -1]))
    after = scorer.read()
    assert torch.equal(after[[0, 2]], before[[4, 0]])
    assert not set(after[[1, 3]].tolist()) & set(before.tolist())
    assert (after > 0).all()


def test_random_scores_are_uniform(steer):
    steered = steer()
    scorer = RandomScore(10, 0, CPU)
    scorer.reindex(steered.sites, torch.full((4000,), -1))
    draws = scorer.read()
    # Three standard errors of the mean and of the variance of U(0, 1).
    assert abs(draws.mean() - 1 / 2) < 3 * (1 / 12 / 4000) ** 0.5
    assert abs(draws.var() - 1 / 12) < 3 * (1 / 180 / 4000) ** 0.5


def test_uniform_scores_are_equal(steer):
    steered = steer()
    scorer = UniformScore(steered.sites)
    assert scorer.read().tolist() == [1] * 10
    assert scorer.state() == {}
