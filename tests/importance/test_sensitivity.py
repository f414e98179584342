import pytest
import torch

from rankflow.importance.sensitivity import Sensitivity

YES, ONE = torch.tensor(True), torch.ones(())


def smoothed(history, decay):
    """AdaLoRA's equations 9 to 11 for one entry, from the history of w and its gradient."""
    mean = spread = 0.0
    for w, g in history:
        now = abs(w * g)
        mean = decay * mean + (1 - decay) * now
        spread = decay * spread + (1 - decay) * abs(now - mean)
    return mean * spread


@pytest.mark.parametrize("decay", [0.5, 0.85])
def test_a_component_is_worth_the_mean_of_its_row_plus_the_mean_of_its_column(
    decay, steer, use_dora
):
    steered = steer(use_dora=use_dora)
    scorer = Sensitivity(steered.sites, decay)
    histories = [([], []) for _ in range(10)]
    for step in range(4):
        steered.backward(step)
        scorer.observe(ONE, YES)
        for (row, column), (_, a, b, da, db) in zip(histories, steered.components(), strict=True):
            row.append(list(zip(a.tolist(), da.tolist(), strict=True)))
            column.append(list(zip(b.tolist(), db.tolist(), strict=True)))
        steered.drift(step)
    expected = []
    for vectors in histories:
        means = []
        for steps in vectors:
            entries = [smoothed(entry, decay) for entry in zip(*steps, strict=True)]
            means.append(sum(entries) / len(entries))
        expected.append(sum(means))
    # The gain 1 - decay is a float32 number on the device.
    torch.testing.assert_close(scorer.read().tolist(), expected, rtol=1e-6, atol=0)
    assert min(expected) > 0


def test_the_factor_of_clipping_enters_squared(steer):
    steered = steer()
    scorers = [Sensitivity(steered.sites, 0.85) for _ in range(2)]
    for step in range(3):
        steered.backward(step)
        scorers[0].observe(ONE, YES)
        scorers[1].observe(torch.tensor(3.0), YES)
    torch.testing.assert_close(scorers[1].read(), 9 * scorers[0].read())


def test_a_wrong_state_is_refused(steer):
    steered = steer()
    scorer = Sensitivity(steered.sites, 0.85)
    state = scorer.state()
    with pytest.raises(KeyError):
        scorer.load({key: value for key, value in state.items() if key != "B.uncertainty.0"})
