import json

import peft
import pytest
import torch
from torch import nn

from rankflow.errors import ExportError
from rankflow.export import peft as peft_module
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.export.report import REPORT, read_report


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_the_report_tells_how_far_the_loaded_adapter_is_from_the_live_one(
    make_adapted, tmp_path, name, use_dora
):
    model = make_adapted(name, use_dora=use_dora)
    report = read_report(export_adapter(model, tmp_path / "out"))
    assert report.format == "peft"
    assert report.checked_by == "peft.PeftModel.from_pretrained"
    assert report.probe.startswith("input_ids (2, 8)")
    assert 0 <= report.relative_error < 1e-5 < report.tolerance
    assert report.adapter_effect > 1000 * report.absolute_error
    assert report.change_error is None
    assert report.largest_rank == 4


def test_the_report_counts_what_is_in_the_file(make_adapted, tmp_path):
    folder = export_adapter(make_adapted("bert"), tmp_path / "out")
    report = read_report(folder)
    tensors = peft.utils.load_peft_weights(str(folder), device="cpu")
    assert report.parameters == sum(t.numel() for t in tensors.values())
    assert report.bytes == (folder / "adapter_model.safetensors").stat().st_size


def test_a_model_that_trains_is_left_as_it_was(
    make_adapted, tmp_path, use_dora, snapshot, assert_same
):
    model = make_adapted("bert", use_dora=use_dora)
    model.train()
    model.get_base_model().bert.encoder.layer[0].eval()
    before = snapshot(model)
    export_adapter(model, tmp_path / "out")
    assert_same(before, snapshot(model))


def test_an_adapter_beside_the_active_one_is_compared_alone(
    make_adapted, tmp_path, snapshot, assert_same, logits_of, stock_base
):
    model = make_adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("other")
    before = snapshot(model)
    folder = export_adapter(model, tmp_path / "out")
    assert_same(before, snapshot(model))
    model.set_adapter("default")
    loaded = peft.PeftModel.from_pretrained(stock_base(model), folder)
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5


def _with_config(change):
    """Let PEFT write the folder, then change the configuration in it."""
    save = peft_module._save_stock

    def save_wrongly(model, adapter_name, folder):
        save(model, adapter_name, folder)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        change(config)
        path.write_text(json.dumps(config))

    return save_wrongly


def _drop_alphas(config):
    config["alpha_pattern"] = {}


def _drop_a_site(config):
    config["target_modules"] = config["target_modules"][1:]


def _nudge_an_alpha(config):
    key = next(iter(config["alpha_pattern"]))
    config["alpha_pattern"][key] *= 1.0001


# PEFT's own words on the lost site, which it then leaves out.
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:Found missing adapter keys:UserWarning")
@pytest.mark.parametrize("change", [_drop_alphas, _drop_a_site, _nudge_an_alpha])
def test_a_configuration_that_means_something_else_is_caught_and_nothing_is_left(
    make_adapted, tmp_path, monkeypatch, change
):
    monkeypatch.setattr(peft_module, "_save_stock", _with_config(change))
    with pytest.raises(ExportError, match="PEFT loads"):
        export_adapter(make_adapted(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_lost_head_is_caught_and_nothing_is_left(make_adapted, tmp_path, monkeypatch):
    collect = peft_module.get_peft_model_state_dict

    def without_head(model, adapter_name):
        state = collect(model, adapter_name=adapter_name)
        return {key: tensor for key, tensor in state.items() if "classifier" not in key}

    monkeypatch.setattr(peft_module, "get_peft_model_state_dict", without_head)
    with pytest.raises(ExportError, match=r"cannot load .*classifier\.weight"):
        export_adapter(make_adapted("bert"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_changed_magnitude_is_caught(make_adapted, tmp_path, monkeypatch):
    collect = peft_module.get_peft_model_state_dict

    def with_other_magnitudes(model, adapter_name):
        state = collect(model, adapter_name=adapter_name)
        return {k: t * (1 + 1e-6 * ("magnitude" in k)) for k, t in state.items()}

    monkeypatch.setattr(peft_module, "get_peft_model_state_dict", with_other_magnitudes)
    with pytest.raises(ExportError, match="magnitude that PEFT loads"):
        export_adapter(make_adapted(use_dora=True), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_merged_adapter_is_refused(make_adapted, tmp_path):
    model = make_adapted()
    model.merge_adapter()
    with pytest.raises(ExportError, match=r"call model\.unmerge_adapter\(\) first"):
        export_adapter(model, tmp_path / "out")


def make_plain(use_dora):
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    config = peft.LoraConfig(r=2, target_modules=["0", "2"], use_dora=use_dora)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                parameter.normal_()
    return model


def test_a_model_that_says_nothing_of_its_inputs_is_exported_and_not_called_compared(
    tmp_path, use_dora
):
    report = read_report(export_adapter(make_plain(use_dora), tmp_path / "out"))
    assert report.probe is None
    assert report.relative_error is None
    assert report.not_probed == "nothing tells what Sequential takes; hand in its inputs"


def test_inputs_can_be_handed_in(tmp_path, use_dora):
    options = ExportOptions(inputs={"input": torch.randn(3, 6)})
    folder = export_adapter(make_plain(use_dora), tmp_path / "out", options=options)
    report = read_report(folder)
    assert report.probe == "the caller's inputs"
    assert report.adapter_effect > 0.1
    assert report.relative_error < 1e-5
    assert json.loads((folder / REPORT).read_text())["not_probed"] is None
