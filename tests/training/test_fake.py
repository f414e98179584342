import numpy as np
import pytest
import torch
from torch import nn

from rankflow.memory import storage_bytes
from rankflow.training.fake import NeedsNumbersError, fake_tensors

CPU = torch.device("cpu")


class Tied(nn.Module):
    """An embedding whose weight is also the head's, and a buffer."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 7)
        self.head = nn.Linear(7, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(7, dtype=torch.float64))

    def forward(self, tokens):
        return self.head(self.embed(tokens) + self.shift.float())


@pytest.fixture
def model():
    with torch.device("meta"):
        return Tied()


def test_a_huge_model_trains_a_step_in_no_memory():
    with torch.device("meta"):
        huge = nn.Sequential(nn.Linear(10**6, 10**6), nn.Linear(10**6, 10))
    with fake_tensors(huge, CPU):
        optimizer = torch.optim.AdamW(huge.parameters())
        huge(torch.randn(8, 10**6)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[huge[0].weight]["exp_avg"].shape == (10**6, 10**6)


def test_shared_weights_stay_shared_and_frozen_ones_frozen(model):
    model.embed.weight.requires_grad_(False)
    with fake_tensors(model, CPU):
        assert model.head.weight is model.embed.weight
        assert not model.embed.weight.requires_grad
        assert storage_bytes([*model.parameters(), *model.buffers()]) == 4 * 77 + 8 * 7
        assert model(torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3, 11)


def test_it_seems_to_lie_on_the_device(model):
    with fake_tensors(model, CPU):
        assert {t.device for t in (*model.parameters(), *model.buffers())} == {CPU}
        assert model.to("cpu") is model


def test_questions_for_numbers_are_answered(model):
    with fake_tensors(model, CPU):
        scores = model(torch.zeros(2, 3, dtype=torch.long)).detach()
        assert scores.sum().item() == 1
        assert scores.argmax().item() == 0
        assert not (scores > 0).any()
        assert np.array_equal(scores.numpy(), np.zeros((2, 3, 11), np.float32))


def test_shapes_that_depend_on_numbers_are_refused(model, caplog):
    refused = pytest.raises(NeedsNumbersError, match=r"cannot run without numbers \(.*nonzero")
    with refused, fake_tensors(model, CPU):
        model.embed.weight.nonzero()
    assert caplog.records == []
