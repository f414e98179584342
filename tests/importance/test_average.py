import pytest
import torch

from rankflow.importance.average import ComponentAverage, follow

YES, NO = torch.tensor(True), torch.tensor(False)


def weighted_mean(values, decay):
    """The bias-corrected average, written as what it means: newer values weigh more."""
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_it_is_the_mean_with_geometric_weights(decay):
    values = torch.rand(20, 3, dtype=torch.float64)
    average = ComponentAverage(3, decay, like=values)
    for step, value in enumerate(values):
        average.update(value, YES)
        expected = [weighted_mean(values[: step + 1, i].tolist(), decay) for i in range(3)]
        torch.testing.assert_close(average.read().tolist(), expected, rtol=2e-5, atol=0)


def test_a_component_that_was_never_updated_reads_zero():
    assert ComponentAverage(2, 0.9, like=torch.zeros(1)).read().tolist() == [0, 0]


def test_a_refused_step_leaves_no_trace_even_if_it_is_not_a_number():
    average = ComponentAverage(2, 0.9, like=torch.zeros(1))
    average.update(torch.tensor([1.0, 2.0]), YES)
    before = {key: value.clone() for key, value in average.state().items()}
    average.update(torch.tensor([float("nan"), float("inf")]), NO)
    assert all(torch.equal(average.state()[key], before[key]) for key in before)


def test_a_newborn_is_judged_on_its_own_life():
    average = ComponentAverage(3, 0.9, like=torch.zeros(1))
    for value in ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0]):
        average.update(torch.tensor(value), YES)
    average = average.followed(torch.tensor([2, -1, 0]))
    average.update(torch.tensor([7.0, 8.0, 9.0]), YES)
    expected = [weighted_mean(v, 0.9) for v in ([3.0, 6.0, 7.0], [8.0], [1.0, 4.0, 9.0])]
    torch.testing.assert_close(average.read().tolist(), expected, rtol=1e-6, atol=0)


def test_its_state_goes_on_where_it_was_saved():
    first = ComponentAverage(2, 0.9, like=torch.zeros(1))
    first.update(torch.tensor([1.0, 2.0]), YES)
    second = ComponentAverage(2, 0.9, like=torch.zeros(1))
    second.load({key: value.clone() for key, value in first.state().items()})
    for average in (first, second):
        average.update(torch.tensor([3.0, 5.0]), YES)
    assert torch.equal(first.read(), second.read())


def test_state_follows_components_of_any_shape():
    state = torch.arange(6.0).view(3, 2)
    assert follow(state, torch.tensor([2, -1, 0])).tolist() == [[4, 5], [0, 0], [0, 1]]
    assert follow(state[:, 0], torch.tensor([-1, 1])).tolist() == [0, 2]
    assert follow(state, torch.tensor([], dtype=torch.long)).shape == (0, 2)
    assert follow(state[:0], torch.tensor([-1, -1])).tolist() == [[0, 0], [0, 0]]


def test_a_number_that_is_not_finite_is_left_out_where_it_stands():
    average = ComponentAverage(3, 0.5, torch.zeros(()))
    average.update(torch.tensor([1.0, 2.0, 3.0]), torch.tensor(True))
    average.update(torch.tensor([5.0, float("inf"), float("nan")]), torch.tensor(True))
    assert average.read().tolist() == pytest.approx([11 / 3, 2.0, 3.0])
