import pytest
import torch
from torch import nn

from rankflow.errors import DivergenceError
from rankflow.importance.finite import are_sound, check_weights, norms_of_all

CPU = torch.device("cpu")


def test_norms_are_of_each_tensor_whatever_its_type_and_shape():
    tensors = [torch.full((2, 2), 3.0).double(), torch.zeros(0), torch.tensor([3.0, 4.0]).half()]
    assert norms_of_all(tensors, CPU).tolist() == [6.0, 0.0, 5.0]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e20])
def test_what_cannot_be_squared_is_not_sound(number):
    norms = norms_of_all([torch.ones(3), torch.tensor([1.0, number])], CPU)
    assert are_sound(norms).tolist() == [True, False]


def test_weights_that_are_not_finite_are_named_with_the_remedy():
    fine, bad = nn.Parameter(torch.ones(2)), nn.Parameter(torch.tensor([1.0, float("nan")]))
    check_weights([(fine, "q"), (fine, None)], "stop")
    with pytest.raises(DivergenceError, match=r"the weights of site 'k' are not finite; stop"):
        check_weights([(fine, "q"), (bad, "k")], "stop")
    with pytest.raises(DivergenceError, match="the weights of the task head or other parameters"):
        check_weights([(fine, "q"), (bad, None)], "stop")
