import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from rankflow.errors import ExportError
from rankflow.export import uniform
from rankflow.export.inspect import WEIGHTS
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.export.report import read_report
from rankflow.export.uniform import smallest_max_lora_rank


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_stock_peft_gives_the_live_logits(make_adapted, tmp_path, logits_of, stock_base):
    model = make_adapted()
    folder = export_adapter(model, tmp_path / "out", format="peft-uniform")
    base = stock_base(model)
    assert (logits_of(base) - logits_of(model)).abs().max() > 0.1
    loaded = peft.PeftModel.from_pretrained(base, folder)
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5


@pytest.mark.parametrize("divide_by", ["config", "tensor"])
def test_a_server_that_knows_one_scale_gives_the_live_logits(
    make_adapted, tmp_path, logits_of, stock_base, divide_by
):
    model = make_adapted()
    folder = export_adapter(model, tmp_path / "out", format="peft-uniform")
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    served = stock_base(model)
    with torch.no_grad():
        for key in [key for key in tensors if key.endswith("lora_A.weight")]:
            A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
            rank = config["r"] if divide_by == "config" else len(A)
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            served.get_submodule(name).weight += config["lora_alpha"] / rank * (B @ A)
    assert (logits_of(served) - logits_of(model)).abs().max() <= 1e-5


def test_every_site_has_one_rank_and_short_names_and_no_patterns_are_left(make_adapted, tmp_path):
    folder = export_adapter(make_adapted(), tmp_path / "out", format="peft-uniform")
    tensors, config = load_file(folder / WEIGHTS), config_of(folder)
    assert {len(t) for k, t in tensors.items() if "lora_A" in k} == {4}
    assert {t.shape[1] for k, t in tensors.items() if "lora_B" in k} == {4}
    assert len(tensors) == 2 * 14
    assert (config["r"], config["lora_alpha"]) == (4, 4)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    assert (config["use_dora"], config["use_rslora"]) == (False, False)
    linear = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == linear


def test_sites_that_short_names_would_not_tell_apart_keep_their_full_names(make_adapted, tmp_path):
    model = make_adapted(target_modules=r"model\.layers\.0\..*_proj")
    folder = export_adapter(model, tmp_path / "out", format="peft-uniform")
    targets = config_of(folder)["target_modules"]
    assert len(targets) == 7
    assert all(name.startswith("model.layers.0.") for name in targets)


def test_the_rank_can_be_larger_than_needed_and_not_smaller(make_adapted, tmp_path):
    model = make_adapted()
    folder = export_adapter(
        model, tmp_path / "out", format="peft-uniform", options=ExportOptions(rank=9)
    )
    assert config_of(folder)["r"] == 9
    report = read_report(folder)
    assert (report.largest_rank, report.max_lora_rank) == (9, 16)
    with pytest.raises(ExportError, match="rank is 3, and the largest site has rank 4"):
        export_adapter(
            model, tmp_path / "small", format="peft-uniform", options=ExportOptions(rank=3)
        )


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, 1), (2, 8), (8, 8), (65, 128), (257, 320), (512, 512)]
)
def test_the_smallest_rank_that_a_server_must_allow(rank, allowed):
    assert smallest_max_lora_rank(rank) == allowed


def test_a_rank_that_no_server_takes_is_refused():
    with pytest.raises(ExportError, match="more than the 512"):
        smallest_max_lora_rank(513)


def test_dora_is_refused_with_two_ways_out(make_adapted, tmp_path):
    message = r"14 of 14 sites have a DoRA magnitude.*merged.*lora-svd"
    with pytest.raises(ExportError, match=message):
        export_adapter(make_adapted(use_dora=True), tmp_path / "out", format="peft-uniform")
    assert list(tmp_path.iterdir()) == []


def test_a_trained_head_is_refused(make_adapted, tmp_path):
    with pytest.raises(ExportError, match=r"trains 'classifier.* beside its sites"):
        export_adapter(make_adapted("bert"), tmp_path / "out", format="peft-uniform")
    assert list(tmp_path.iterdir()) == []


def test_a_scale_that_was_not_baked_in_is_caught_and_nothing_is_left(
    make_adapted, tmp_path, monkeypatch
):
    pad = uniform._pad

    def forget_the_scale(site, rank):
        factors = pad(site, rank)
        return type(factors)(factors.A, factors.B / site.scale)

    monkeypatch.setattr(uniform, "_pad", forget_the_scale)
    with pytest.raises(ExportError, match="change that PEFT loads at site"):
        export_adapter(make_adapted(), tmp_path / "out", format="peft-uniform")
    assert list(tmp_path.iterdir()) == []


def test_the_live_model_is_left_as_it_was(make_adapted, tmp_path, snapshot, assert_same):
    model = make_adapted()
    before = snapshot(model)
    config = model.peft_config["default"].to_dict()
    export_adapter(model, tmp_path / "out", format="peft-uniform")
    assert_same(before, snapshot(model))
    assert model.peft_config["default"].to_dict() == config
