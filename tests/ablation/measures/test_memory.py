import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from rankflow.ablation.measures.memory import measure_peak_bytes
from rankflow.memory import peak_bytes

ROWS, WIDTH = 8, 64


class Net(nn.Module):
    """Two layers with dropout and running statistics; its loss is in its outputs."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.dropout = nn.Dropout(0.5)
        self.second = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs, labels=None):
        hidden = self.dropout(self.norm(self.first(inputs)))
        return {"loss": (self.second(hidden) - labels).square().mean()}


def measure(model, batch):
    return measure_peak_bytes(model, lambda: model(**batch)["loss"])


@pytest.fixture
def batch():
    return {"inputs": torch.randn(ROWS, WIDTH), "labels": torch.randn(ROWS, WIDTH)}


def state_of(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def test_it_is_what_a_first_step_takes_whatever_gradients_there_are(batch):
    model = Net()

    def step():
        model(**batch)["loss"].backward()

    expected = peak_bytes(step, torch.device("cpu"))
    assert expected > model.second.weight.nbytes + batch["inputs"].nbytes
    for parameter in model.parameters():
        assert parameter.grad is not None
    assert measure(model, batch) == expected


def test_fewer_trained_parameters_take_less(batch):
    full = measure(Net(), batch)
    config = LoraConfig(r=1, target_modules=["first", "second"])
    assert measure(get_peft_model(Net(), config), batch) < full


def test_model_gradients_modes_and_random_numbers_stay(batch):
    model = Net()
    model.second.bias.grad = torch.full((WIDTH,), 7.0)
    model.norm.eval()
    weights, random = state_of(model), torch.get_rng_state()
    modes = [module.training for module in model.modules()]
    measure(model, batch)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert torch.equal(grads.pop("second.bias"), torch.full((WIDTH,), 7.0))
    assert set(grads.values()) == {None}
    assert set(batch) == {"inputs", "labels"}


def test_dropout_is_on(batch):
    seen = []
    model = Net().eval()
    model.dropout.register_forward_hook(lambda module, *_: seen.append(module.training))
    measure(model, batch)
    assert seen == [True]
