"""What RankFlow uses of PEFT's private interface: an upgrade that changes it must fail here."""

import inspect

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import LoraVariant, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from peft.utils import get_peft_model_state_dict
from peft.utils.integrations import dequantize_module_weight
from peft.utils.other import get_pattern_key
from torch import nn

VARIANTS = {
    "linear": DoraLinearVariant,
    "linear without bias": DoraLinearVariant,
    "Conv1D of transformers": DoraLinearVariant,
    "conv1d": DoraConv1dVariant,
    "conv2d": DoraConv2dVariant,
    "conv2d without bias": DoraConv2dVariant,
    "conv3d": DoraConv3dVariant,
    "embedding": DoraEmbeddingVariant,
}


class Spy(LoraVariant):
    """Records how PEFT calls a variant."""

    calls: list = []  # noqa: RUF012

    @staticmethod
    def forward(module, active_adapter, x, result, **kwargs):
        Spy.calls.append(("forward", module, active_adapter, x, result, kwargs))
        return result + 1

    @staticmethod
    def merge_safe(module, active_adapter, orig_weight):
        Spy.calls.append(("merge_safe", module, active_adapter, orig_weight))
        return orig_weight + 1

    @staticmethod
    def merge_unsafe(module, active_adapter, orig_weight):
        Spy.calls.append(("merge_unsafe", module, active_adapter, orig_weight))
        orig_weight.data = orig_weight.data + 1

    @staticmethod
    def unmerge(module, active_adapter, orig_weight):
        Spy.calls.append(("unmerge", module, active_adapter, orig_weight))
        return orig_weight - 1


def only_layer(model):
    (layer,) = [m for m in model.modules() if isinstance(m, LoraLayer)]
    return layer


@pytest.fixture
def spied(layer_case, host, adapt):
    """A layer of every kind whose variant is a spy, its base layer, and an input."""
    Spy.calls = []
    model = adapt(host(layer_case))
    layer = only_layer(model)
    layer.lora_variant["default"] = Spy()
    return model, layer, layer.get_base_layer(), layer_case.inputs()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("forward", ["module", "active_adapter", "x", "result", "kwargs"]),
        ("merge_safe", ["module", "active_adapter", "orig_weight"]),
        ("merge_unsafe", ["module", "active_adapter", "orig_weight"]),
        ("unmerge", ["module", "active_adapter", "orig_weight"]),
    ],
)
def test_a_variant_is_made_of_static_methods_of_these_arguments(method, parameters):
    assert isinstance(inspect.getattr_static(LoraVariant, method), staticmethod)
    assert list(inspect.signature(getattr(LoraVariant, method)).parameters) == parameters


def test_a_variant_has_no_other_methods_than_those_known():
    methods = {name for name in vars(LoraVariant) if not name.startswith("__")}
    known = {"init", "forward", "merge_safe", "merge_unsafe", "unmerge", "supports_lora_conversion"}
    assert methods == known


def test_plain_lora_has_no_variant_and_dora_has_one_of_its_kind(layer_cases, host, adapt):
    for name, case in layer_cases.items():
        plain = only_layer(adapt(host(case)))
        assert plain.lora_variant == {}
        assert isinstance(plain.lora_variant, dict)
        dora = only_layer(adapt(host(case), use_dora=True))
        assert type(dora.lora_variant["default"]) is VARIANTS[name]


def test_the_forward_hands_over_the_base_output_and_takes_the_whole_output(spied):
    model, layer, base, x = spied
    out = model(x)
    ((_, module, adapter, given, result, _),) = Spy.calls
    assert module is layer
    assert adapter == "default"
    assert torch.equal(given, x)
    assert torch.equal(result, base(x))
    assert torch.equal(out, result + 1)


@pytest.mark.parametrize(("safe", "method"), [(False, "merge_unsafe"), (True, "merge_safe")])
def test_merging_and_unmerging_go_through_the_variant(safe, method, spied):
    model, layer, base, x = spied
    before = base.weight.detach().clone()
    layer.merge(safe_merge=safe)
    torch.testing.assert_close(base.weight.detach(), before + 1)
    assert torch.equal(model(x), base(x))
    layer.unmerge()
    torch.testing.assert_close(base.weight.detach(), before)
    assert [call[0] for call in Spy.calls] == [method, "unmerge"]


def test_nothing_but_the_variant_is_asked_when_the_rank_is_zero(spied):
    model, layer, _, x = spied
    name = "default"
    if name in layer.lora_embedding_A:
        layer.lora_embedding_A[name] = nn.Parameter(layer.lora_embedding_A[name][:0].detach())
        layer.lora_embedding_B[name] = nn.Parameter(layer.lora_embedding_B[name][:, :0].detach())
    else:
        layer.lora_A[name].weight = nn.Parameter(layer.lora_A[name].weight[:0].detach())
        layer.lora_B[name].weight = nn.Parameter(layer.lora_B[name].weight[:, :0].detach())
    model(x)
    layer.merge()
    layer.unmerge()
    assert [call[0] for call in Spy.calls] == ["forward", "merge_unsafe", "unmerge"]


def test_the_unmerged_base_weight_is_a_copy_without_the_merged_adapters(layer_case, host, adapt):
    model = adapt(host(layer_case))
    layer = only_layer(model)
    base = layer.get_base_layer()
    before = base.weight.detach().clone()
    layer.merge()
    merged = base.weight.detach().clone()
    for safe in (False, True):
        with layer._unmerged_base_weight(safe_merge=safe) as weight:
            torch.testing.assert_close(weight, before)
            assert weight.data_ptr() != base.weight.data_ptr()
        torch.testing.assert_close(base.weight.detach(), merged)
    assert layer.merged_adapters == ["default"]


def test_a_layer_caches_what_merging_must_remember(layer_case, host, adapt):
    layer = only_layer(adapt(host(layer_case)))
    value = torch.ones(2)
    layer._cache_store("rankflow", value)
    assert layer._cache_pop("rankflow") is value
    with pytest.raises(KeyError):
        layer._cache_pop("rankflow")


def test_an_unquantised_weight_is_dequantised_into_itself(layer_case):
    base = layer_case.make()
    assert torch.equal(dequantize_module_weight(base), base.weight)


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("proj", "proj", True),
        ("proj", "block.proj", True),
        ("proj", "block.aproj", False),
        ("^proj", "proj", True),
        ("^proj", "block.proj", False),
        (r"^block\.proj", "block.proj", True),
        (r"^block\.proj", "a.block.proj", False),
        (r"^block\.proj", "block.proj.base", False),
        ("a.c", "abc", True),
        ("a|b", "x.b", True),
    ],
)
def test_a_pattern_is_a_regex_for_a_whole_name_or_the_end_of_one(pattern, name, matches):
    assert get_pattern_key([pattern], name) == (pattern if matches else name)
    assert matches or pattern != name


def test_the_first_pattern_that_matches_wins():
    assert get_pattern_key(["proj", "^proj"], "proj") == "proj"
    assert get_pattern_key(["^proj", "proj"], "proj") == "^proj"


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [
        (["proj"], ["proj", "block.proj"]),
        (["block.proj"], ["block.proj"]),
        (r"proj", ["proj"]),
        (r"block\.proj|other", ["block.proj", "other"]),
        (r"roj", []),
    ],
)
def test_target_modules_are_ends_of_names_or_a_regex_for_whole_ones(targets, adapted):
    base = nn.ModuleDict(
        {
            "proj": nn.Linear(2, 2),
            "block": nn.ModuleDict({"proj": nn.Linear(2, 2)}),
            "other": nn.Linear(2, 2),
        }
    )
    config = peft.LoraConfig(r=1, target_modules=targets)
    if not adapted:
        with pytest.raises(ValueError, match="not found in the base model"):
            peft.get_peft_model(base, config)
        return
    model = peft.get_peft_model(base, config).get_base_model()
    assert [n for n, m in model.named_modules() if isinstance(m, LoraLayer)] == adapted


def test_factors_lie_where_the_sites_look_for_them(layer_case, host, adapt):
    layer = only_layer(adapt(host(layer_case), r=2))
    matrix = layer_case.matrix(layer.get_base_layer().weight)
    if layer_case.kind == "embedding":
        assert "default" not in layer.lora_A
        A, B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    else:
        assert "default" not in layer.lora_embedding_A
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert isinstance(A, nn.Parameter)
    assert isinstance(B, nn.Parameter)
    assert A.flatten(1).shape == (2, matrix.shape[1])
    assert B.flatten(1).shape == (matrix.shape[0], 2)


def test_fan_in_fan_out_marks_the_transposed_linear_layer(layer_cases, host, adapt):
    marks = {
        name: getattr(only_layer(adapt(host(case))), "fan_in_fan_out", False)
        for name, case in layer_cases.items()
    }
    assert {name for name, mark in marks.items() if mark} == {"Conv1D of transformers"}


def test_a_magnitude_is_one_number_a_row_and_starts_at_the_norms(layer_case, host, adapt):
    layer = only_layer(adapt(host(layer_case), use_dora=True, trained=False))
    weight = layer.get_base_layer().weight.detach()
    norms = torch.stack([row.double().square().sum().sqrt() for row in layer_case.matrix(weight)])
    magnitude = layer.lora_magnitude_vector["default"].weight
    assert magnitude.requires_grad
    shape = (1, len(norms), *[1] * (weight.ndim - 2))
    assert tuple(magnitude.shape) == (shape if layer_case.kind == "conv" else (len(norms),))
    torch.testing.assert_close(magnitude.detach().flatten().double(), norms, rtol=1e-6, atol=0)


def test_dora_is_the_magnitude_times_the_normalised_rows(layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True).double()
    layer = only_layer(model)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    base = layer.get_base_layer()
    embedding = layer_case.kind == "embedding"
    A = layer.lora_embedding_A["default"] if embedding else layer.lora_A["default"].weight
    B = layer.lora_embedding_B["default"] if embedding else layer.lora_B["default"].weight
    magnitude = layer.lora_magnitude_vector["default"].weight
    leaves = [p.detach().clone().requires_grad_() for p in (A, B, magnitude)]

    V = layer_case.matrix(base.weight.detach()) + 2.0 * leaves[1].flatten(1) @ leaves[0].flatten(1)
    norms = torch.stack([row.dot(row).sqrt() for row in V]).detach()  # the paper's section 4.3
    W = layer_case.weight_like((leaves[2].flatten() / norms)[:, None] * V, base.weight)
    expected = layer_case.apply(base, x, W, getattr(base, "bias", None))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)

    model(x).pow(3).sum().backward()
    expected.pow(3).sum().backward()
    for mine, leaf in zip((A, B, magnitude), leaves, strict=True):
        torch.testing.assert_close(mine.grad, leaf.grad, rtol=1e-11, atol=1e-11)


def test_scaling_is_alpha_over_rank_and_kept_by_adapter(layer_case, host, adapt):
    layer = only_layer(adapt(host(layer_case), r=2, lora_alpha=5))
    assert layer.scaling == {"default": 2.5}
    assert layer.r == {"default": 2}
    assert layer.lora_alpha == {"default": 5}
    assert layer.use_rslora == {"default": False}
    assert layer.lora_bias == {"default": False}
    layer.r["default"], layer.lora_alpha["default"] = 4, 8
    layer.set_scale("default", 3)
    assert layer.scaling["default"] == 6


@pytest.mark.parametrize("wrapper", [MultiheadAttention, ParamWrapper])
def test_layers_that_cannot_be_resized_are_lora_layers_too(wrapper):
    assert issubclass(wrapper, LoraLayer)


def test_a_stored_adapter_has_these_keys(mixed):
    stored = get_peft_model_state_dict(mixed(use_dora=True))
    linear = {"lora_A.weight", "lora_B.weight", "lora_magnitude_vector"}
    embedding = {"lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"}
    assert set(stored) == {
        f"base_model.model.{site}.{key}"
        for site in ("embed", "fan", "first", "second", "conv")
        for key in (embedding if site == "embed" else linear)
    }


def test_a_rank_of_zero_is_refused_by_pefts_own_config(host, layer_cases):
    config = peft.LoraConfig(target_modules=["layer"], rank_pattern={"layer": 0})
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        peft.get_peft_model(host(layer_cases["linear"]), config)
