import pytest
import torch

from rankflow.importance.norms import Frobenius, Norm

YES, ONE = torch.tensor(True), torch.ones(())


def test_the_norm_is_the_frobenius_norm_of_the_scaled_component(steer, use_dora):
    steered = steer(use_dora=use_dora)
    steered.sites[2].layer.scaling["default"] = 0.3
    expected = []
    for site, a, b, _, _ in steered.components():
        factors, _ = steered.factors(site)
        effective = (factors * b).tolist()  # under DoRA each row is scaled by m / n
        component = [[site.scale * x * y for x in a.tolist()] for y in effective]
        expected.append(sum(v * v for row in component for v in row) ** 0.5)
    torch.testing.assert_close(Norm(steered.sites).read().tolist(), expected, rtol=1e-6, atol=0)


def test_the_norm_is_that_of_the_weights_now(steer):
    steered = steer()
    norm = Norm(steered.sites)
    before = norm.read()
    steered.sites[2].A.data *= 2
    torch.testing.assert_close(norm.read()[2:5], 2 * before[2:5])
    assert torch.equal(norm.read()[:2], before[:2])


def dense_shares(steered):
    """||b_i a_i^T|| over ||B A||, from the dense matrices; under DoRA with rows times m / n."""
    shares = []
    for site in steered.sites:
        c, _ = steered.factors(site)
        parts = [torch.outer(c * b, a) for s, a, b, _, _ in steered.components() if s is site]
        if parts:
            whole = torch.stack(parts).sum(dim=0)
            shares += [(part.norm() / (whole.norm() + 1e-8)).item() for part in parts]
    return shares


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_frobenius_averages_the_share_of_a_component_in_its_site(decay, steer, use_dora):
    steered = steer(use_dora=use_dora)
    scorer = Frobenius(steered.sites, decay)
    history = []
    for step in range(5):
        scorer.observe(ONE, YES)
        history.append(dense_shares(steered))
        steered.drift(step)
    weights = [decay ** (4 - i) for i in range(5)]
    expected = (torch.tensor(weights) / sum(weights)) @ torch.tensor(history)
    torch.testing.assert_close(scorer.read(), expected, rtol=1e-5, atol=1e-7)


def test_a_sole_component_has_the_whole_share(steer):
    steered = steer()
    scorer = Frobenius(steered.sites, 0.9)
    scorer.observe(ONE, YES)
    assert scorer.read()[5].item() == pytest.approx(1, rel=1e-6)  # "second" has rank 1


def test_the_share_does_not_depend_on_the_scale(steer):
    steered = steer()
    scorers = [Frobenius(steered.sites, 0.9) for _ in range(2)]
    scorers[0].observe(ONE, YES)
    for site in steered.sites:
        site.layer.scaling["default"] *= 7
    scorers[1].observe(ONE, YES)
    assert torch.equal(scorers[0].read(), scorers[1].read())


def test_components_of_zero_have_no_share_and_no_nan(steer):
    steered = steer()
    for site in steered.sites:
        site.B.data.zero_()
    scorer = Frobenius(steered.sites, 0.9)
    scorer.observe(ONE, YES)
    assert scorer.read().tolist() == [0] * 10
