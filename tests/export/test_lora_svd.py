import json
import math

import peft
import pytest
import torch
from safetensors.torch import load_file

from rankflow.errors import ExportError
from rankflow.export import lora_svd
from rankflow.export.inspect import WEIGHTS
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.export.report import read_report


def write(model, folder, **options):
    return export_adapter(model, folder, format="lora-svd", options=ExportOptions(**options))


def dense_changes(model):
    """What the adapter adds to each weight, from the paper's equation in float64."""
    changes = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, peft.tuners.lora.LoraLayer):
            continue
        W = layer.get_base_layer().weight.detach().double()
        B, A = (m["default"].weight.detach().double() for m in (layer.lora_B, layer.lora_A))
        V = W + layer.scaling["default"] * B @ A
        if "default" in layer.lora_magnitude_vector:
            m = layer.lora_magnitude_vector["default"].weight.detach().double()
            V = m[:, None] * V / V.norm(dim=1, keepdim=True)
        changes[name] = V - W
    return changes


def written_changes(folder):
    tensors = load_file(folder / WEIGHTS)
    changes = {}
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        B = tensors[key.replace("lora_A", "lora_B")].double()
        changes[name] = B @ tensors[key].double()
    return changes


def relative_error(model, folder):
    changes, written = dense_changes(model), written_changes(folder)
    wrong = sum((c - written.get(name, 0)).square().sum() for name, c in changes.items())
    return math.sqrt(wrong / sum(c.square().sum() for c in changes.values()))


@pytest.mark.parametrize("name", ["llama", "bert"])
@pytest.mark.parametrize("max_error", [None, 0.1, 0.4])
def test_the_error_of_dora_as_lora_is_measured_told_and_within_the_limit(
    make_adapted, tmp_path, stock_base, logits_of, name, max_error
):
    model = make_adapted(name, use_dora=True)
    folder = write(model, tmp_path / "out", max_error=max_error)
    limit = 0.01 if max_error is None else max_error
    report = read_report(folder)
    assert limit / 2 < report.change_error <= limit
    assert report.change_error == pytest.approx(relative_error(model, folder), rel=1e-6)
    assert report.tolerance is None
    loaded = peft.PeftModel.from_pretrained(stock_base(model), folder)
    config = loaded.peft_config["default"]
    assert not config.use_dora
    outputs, live = logits_of(loaded), logits_of(model)
    effect = (logits_of(stock_base(model)) - live).abs().max()
    assert (outputs - live).abs().max() < 3 * limit * effect
    assert report.adapter_effect > report.absolute_error > 0


def test_every_site_has_scale_one_at_its_own_rank(make_adapted, tmp_path):
    folder = write(make_adapted(use_dora=True), tmp_path / "out", max_error=0.3)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"]
    assert len(set(config["rank_pattern"].values())) > 2
    tensors = load_file(folder / WEIGHTS)
    for pattern, rank in config["rank_pattern"].items():
        name = pattern.removeprefix("^").replace("\\", "")
        assert len(tensors[f"base_model.model.{name}.lora_A.weight"]) == rank
    assert not any("magnitude" in key for key in tensors)


def test_plain_lora_is_written_exactly_at_its_own_ranks(
    make_adapted, tmp_path, stock_base, logits_of
):
    model = make_adapted()
    folder = write(model, tmp_path / "out", max_error=1e-9)
    assert read_report(folder).change_error < 1e-6
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["rank_pattern"].values()) == sorted([3, 1, 2, 4] * 2 + [3])
    loaded = peft.PeftModel.from_pretrained(stock_base(model), folder)
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5


def test_a_rank_is_a_budget_that_is_kept(make_adapted, tmp_path):
    model = make_adapted(use_dora=True)
    folder = write(model, tmp_path / "out", rank=3, max_error=0.9)
    costs = sum(sum(change.shape) for change in dense_changes(model).values())
    assert 0.9 * 3 * costs < read_report(folder).parameters <= 3 * costs


def test_a_rank_that_leaves_too_much_out_is_refused_with_one_that_would_do(make_adapted, tmp_path):
    model = make_adapted(use_dora=True)
    with pytest.raises(ExportError, match=r"which has full rank\. Rank \d+ would do") as caught:
        write(model, tmp_path / "out", rank=2, max_error=0.05)
    assert list(tmp_path.iterdir()) == []
    enough = int(str(caught.value).split("Rank ")[1].split()[0])
    folder = write(model, tmp_path / "out", rank=enough, max_error=0.05)
    assert read_report(folder).change_error <= 0.05
    with pytest.raises(ExportError, match="leaves"):
        write(model, tmp_path / "less", rank=enough - 1, max_error=0.05)


def test_the_trained_head_travels_along(make_adapted, tmp_path):
    model = make_adapted("bert", use_dora=True)
    tensors = load_file(write(model, tmp_path / "out", max_error=0.3) / WEIGHTS)
    live = model.get_base_model().classifier.modules_to_save["default"].weight
    assert torch.equal(tensors["base_model.model.classifier.weight"], live)


def test_every_kind_of_layer_becomes_lora(mixed, tmp_path):
    model = mixed(use_dora=True)
    tokens = torch.randint(12, (3, 4))
    options = ExportOptions(max_error=1e-6, inputs={"tokens": tokens})
    report = read_report(
        export_adapter(model, tmp_path / "out", format="lora-svd", options=options)
    )
    assert report.change_error < 1e-6
    assert report.absolute_error < 1e-4 < 1e-2 < report.adapter_effect


def test_a_wrong_component_is_caught_and_nothing_is_left(make_adapted, tmp_path, monkeypatch):
    make = lora_svd._factors

    def swap_signs(site, part, kept):
        factors = make(site, part, kept)
        return type(factors)(factors.A, -factors.B)

    monkeypatch.setattr(lora_svd, "_factors", swap_signs)
    with pytest.raises(ExportError, match="what PEFT loads leaves 19"):
        write(make_adapted(use_dora=True), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_live_model_is_left_as_it_was(make_adapted, tmp_path, snapshot, assert_same):
    model = make_adapted("bert", use_dora=True)
    before = snapshot(model)
    config = model.peft_config["default"].to_dict()
    write(model, tmp_path / "out", max_error=0.3)
    assert_same(before, snapshot(model))
    assert model.peft_config["default"].to_dict() == config
