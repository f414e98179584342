import pytest
import torch
import transformers
from torch import nn

from rankflow.errors import ExportError
from rankflow.export.probe import Difference, Probe, Unprobed, compare, outputs_of, probe_model

INFINITE = float("inf")


def test_equal_infinities_are_no_error_and_others_are():
    want = torch.tensor([1.0, -INFINITE])
    assert compare([want], [want.clone()]) == Difference(0.0, 0.0)
    assert compare([want], [torch.tensor([1.0, 0.0])]).absolute == INFINITE


@pytest.mark.parametrize(
    "found", [[], [torch.zeros(2, 1)], [torch.full((1, 2), float("nan"))], [torch.zeros(1, 2)] * 2]
)
def test_outputs_that_are_missing_of_another_shape_or_no_numbers_are_infinitely_far(found):
    assert compare([torch.ones(1, 2)], found) == Difference(INFINITE, INFINITE)


def test_the_worst_tensor_counts_against_its_own_size():
    small, large = torch.tensor([0.01]), torch.tensor([100.0])
    found = compare([small, large], [small + 0.001, large + 0.5])
    assert found.absolute == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.1, rel=1e-5)


def test_every_transformer_takes_the_inputs_made_for_it(transformer):
    model = transformer().eval()
    probe = probe_model(model, None)
    assert isinstance(probe, Probe)
    assert probe.inputs["input_ids"].max() < model.config.vocab_size
    assert any(tensor.shape[-1] in (3, 13) for tensor in probe.outputs)
    again = probe_model(model, None)
    assert torch.equal(again.inputs["input_ids"], probe.inputs["input_ids"])
    assert compare(again.outputs, probe.outputs) == Difference(0.0, 0.0)


def test_a_vision_model_gets_images_of_its_size():
    config = transformers.ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        num_channels=2,
    )
    probe = probe_model(transformers.ViTForImageClassification(config).eval(), None)
    assert probe.inputs["pixel_values"].shape == (2, 2, 8, 8)


class Picky(nn.Linear):
    """Has inputs to offer that it does not take."""

    def __init__(self):
        super().__init__(3, 2)
        self.dummy_inputs = {"input": torch.zeros(1, 4)}


def test_inputs_that_a_model_does_not_take_are_no_failure_of_the_export():
    found = probe_model(Picky(), None)
    assert isinstance(found, Unprobed)
    assert "does not take input (1, 4)" in found.reason


def test_inputs_of_the_caller_that_the_model_does_not_take_are_the_callers_error():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        probe_model(Picky(), {"input": torch.zeros(1, 4)})


def test_a_model_that_gives_nan_is_refused():
    model = nn.Linear(2, 1)
    with pytest.raises(ExportError, match="gives NaN"):
        probe_model(model, {"input": torch.full((1, 2), float("nan"))})


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return {"a": x * self.scale, "b": (None, [x + 1]), "ids": torch.arange(3)}


def test_all_floating_point_outputs_count():
    first, second = outputs_of(Nested(), {"x": torch.ones(2)})
    assert first.tolist() == [1, 1]
    assert second.tolist() == [2, 2]
