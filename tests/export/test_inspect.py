import json

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.numpy import save_file
from torch import nn

from rankflow.errors import RankFlowError
from rankflow.export.inspect import CONFIG, FACTS, WEIGHTS, inspect_adapter


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList(nn.Linear(6, 5 + i) for i in range(11))
        self.conv = nn.Conv2d(3, 4, (1, 2))
        self.head = nn.Linear(6, 2)


def save_adapter(folder, **config):
    torch.manual_seed(0)
    model = peft.get_peft_model(Net(), peft.LoraConfig(**config))
    model.save_pretrained(folder)
    return model


def live_sites(model):
    """Name, rank, scale, magnitude and parameters of each site, read from the model in memory."""
    return {
        name.removeprefix("base_model.model."): (
            layer.r["default"],
            layer.scaling["default"],
            bool(layer.use_dora["default"]),
            sum(p.numel() for p in layer.parameters() if p.requires_grad),
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


CONFIGS = {
    "lora": {"target_modules": ["embed", "conv", r"layers.2", "layers.10"], "r": 3},
    "dora": {"target_modules": "all-linear", "r": 2, "use_dora": True},
    "dora everywhere": {"target_modules": ["embed", "conv", "layers.0"], "r": 2, "use_dora": True},
    "patterns": {
        "target_modules": ["layers.1", "layers.10", "conv"],
        "r": 4,
        "rank_pattern": {"^layers.1$": 1, "conv": 3},
        "alpha_pattern": {"^layers.1$": 6, "conv": 2},
    },
    "rank-stabilised": {"target_modules": ["layers.1"], "r": 4, "use_rslora": True},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_the_summary_of_a_saved_adapter_is_that_of_the_live_one(case, tmp_path):
    model = save_adapter(tmp_path, lora_alpha=5, **CONFIGS[case])
    summary = inspect_adapter(tmp_path)
    found = {
        site.name: (site.rank, pytest.approx(site.scale), site.has_magnitude, site.parameters)
        for site in summary.sites
    }
    assert found == live_sites(model)
    assert all(site.rank == site.config_rank for site in summary.sites)
    assert summary.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert summary.other_parameters == 0


def test_a_saved_head_is_counted_apart(tmp_path):
    save_adapter(tmp_path, target_modules=["layers.0"], r=1, modules_to_save=["head"])
    summary = inspect_adapter(tmp_path)
    assert (summary.parameters, summary.other_parameters) == (6 + 5, 2 * 6 + 2)


def test_sites_come_in_counting_order(tmp_path):
    save_adapter(tmp_path, target_modules=["layers.10", "layers.2", "embed"], r=1)
    assert list(inspect_adapter(tmp_path).ranks) == ["embed", "layers.2", "layers.10"]


def write_adapter(folder, tensors, **config):
    save_file(
        {key: np.zeros(shape, np.float32) for key, shape in tensors.items()}, folder / WEIGHTS
    )
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "org/base"}
    (folder / CONFIG).write_text(json.dumps(values | config))


def test_ranks_are_those_of_the_tensors_even_where_the_configuration_differs(tmp_path):
    tensors = {
        "base_model.model.q.lora_A.weight": (2, 7),
        "base_model.model.q.lora_B.weight": (5, 2),
        "base_model.model.q.lora_B.bias": (5,),
        "base_model.model.v.lora_A.weight": (0, 7),
        "base_model.model.v.lora_B.weight": (5, 0),
        "base_model.model.v.lora_magnitude_vector.weight": (5,),
        "base_model.model.k.lora_magnitude_vector": (5,),
    }
    write_adapter(tmp_path, tensors)
    summary = inspect_adapter(tmp_path)
    assert summary.base_model == "org/base"
    assert summary.ranks == {"k": 0, "q": 2, "v": 0}
    assert [site.config_rank for site in summary.sites] == [4, 4, 4]
    assert [site.scale for site in summary.sites] == [0, 4, 0]
    assert [site.has_magnitude for site in summary.sites] == [True, False, True]
    assert [site.parameters for site in summary.sites] == [5, 29, 5]


A = {"base_model.model.q.lora_A.weight": (2, 7), "base_model.model.q.lora_B.weight": (5, 2)}


@pytest.mark.parametrize(
    ("missing", "message"),
    [(CONFIG, f"holds no {CONFIG}; name an"), (WEIGHTS, f"{WEIGHTS} cannot be read: No such file")],
)
def test_a_missing_file_is_named(missing, message, tmp_path):
    write_adapter(tmp_path, A)
    (tmp_path / missing).unlink()
    with pytest.raises(RankFlowError, match=message):
        inspect_adapter(tmp_path)


def test_the_adapter_of_a_run_is_pointed_to(tmp_path):
    (tmp_path / "adapter").mkdir()
    write_adapter(tmp_path / "adapter", A)
    with pytest.raises(RankFlowError, match=r"did you mean .*/adapter\?"):
        inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not valid JSON: Expecting property name"),
        ("[]", "has peft_type None; only LORA"),
        ('{"peft_type": "ADALORA"}', "has peft_type 'ADALORA'; only LORA"),
        ('{"peft_type": "LORA", "lora_alpha": 8}', "lacks the key 'r'"),
    ],
)
def test_a_configuration_of_another_kind_is_refused(config, message, tmp_path):
    write_adapter(tmp_path, A)
    (tmp_path / CONFIG).write_text(config)
    with pytest.raises(RankFlowError, match=message):
        inspect_adapter(tmp_path)


def test_weights_cut_short_are_refused(tmp_path):
    write_adapter(tmp_path, A)
    whole = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(whole[:-4])
    with pytest.raises(RankFlowError, match=f"{WEIGHTS} is damaged: .*; save or copy it again"):
        inspect_adapter(tmp_path)


def test_weights_without_a_component_are_refused(tmp_path):
    write_adapter(tmp_path, {"classifier.weight": (2, 2)})
    with pytest.raises(RankFlowError, match="holds no LoRA tensor; was it saved by PEFT"):
        inspect_adapter(tmp_path)


@pytest.mark.parametrize(
    ("text", "trained"),
    [(None, None), ('{"trained_parameters": 11}', 11), ('{"ranks": {}}', None), ("[]", None)],
)
def test_what_was_trained_is_told_where_a_file_beside_knows_it(text, trained, tmp_path):
    write_adapter(tmp_path, A)
    if text is not None:
        (tmp_path / FACTS).write_text(text)
    assert inspect_adapter(tmp_path).trained_parameters == trained


def test_a_damaged_file_beside_is_named(tmp_path):
    write_adapter(tmp_path, A)
    (tmp_path / FACTS).write_text("{")
    with pytest.raises(RankFlowError, match=f"{FACTS} is not valid JSON"):
        inspect_adapter(tmp_path)
