import pytest
from peft.tuners.lora import LoraLayer

from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.methods.targets import Target, find_targets
from rankflow.training.adapter import add_adapter

TARGETS = {
    "all linear": {"target_modules": "all-linear"},
    "by last name": {"target_modules": ["value", "v_proj", "dense", "down_proj"]},
    "by regex": {"target_modules": r".*(query|q_proj|output\.dense|up_proj|classifier)"},
    "of one layer": {
        "target_modules": ["value", "v_proj"],
        "layers_to_transform": [1],
        "layers_pattern": None,
    },
}


@pytest.mark.parametrize("adapter", TARGETS.values(), ids=TARGETS.keys())
def test_the_targets_are_what_lora_would_adapt(host_case, adapter):
    setting = host_case.setting(**adapter)
    targets = find_targets(host_case.base(), setting)
    model = add_adapter(host_case.base(), host_case.spec, setting.adapter)
    sites = {
        name.removeprefix("base_model.model."): Target(m.in_features, m.out_features, False)
        for name, m in model.named_modules()
        if isinstance(m, LoraLayer)
    }
    assert targets == sites
    assert list(targets) == list(sites)


def test_transposed_weights_are_read_the_right_way_round(host_cases, transposed):
    targets = find_targets(transposed, host_cases["language model"].setting())
    assert targets["transformer.h.0.mlp.c_fc"] == Target(16, 64, transposed=True)


def test_modules_that_train_in_full_are_no_targets(host_cases):
    case = host_cases["classifier with a new pooler"]
    setting = case.setting(modules_to_save=["key"])
    names = find_targets(case.base(), setting)
    assert not [n for n in names if "pooler" in n or "classifier" in n or n.endswith("key")]


@pytest.mark.parametrize(
    ("target", "words"),
    [("nowhere", "no module fits target_modules"), ("word_embeddings", "is a Embedding")],
)
def test_what_cannot_be_adapted_is_refused_in_words(host_cases, target, words):
    case = host_cases["token classifier"]
    with pytest.raises(UnsupportedError, match=words):
        find_targets(case.base(), case.setting(target_modules=[target]))
