import copy
from types import MappingProxyType

import pytest
import torch
from peft import get_peft_model_state_dict
from torch.nn import functional

from rankflow.ablation.methods.adalora import AdaloraMethod
from rankflow.ablation.methods.boft import BoftMethod
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.methods.peft_tuners import TUNERS
from rankflow.ablation.methods.prompts import PROMPTS
from rankflow.ablation.methods.targets import find_targets
from rankflow.ablation.sizing import count_trainable
from rankflow.errors import SpecError
from rankflow.training.models import BaseModel
from rankflow.training.pooling import pool

SITED = MappingProxyType({**TUNERS, "boft": BoftMethod(), "adalora": AdaloraMethod()})
ROWS = MappingProxyType({**SITED, **PROMPTS})
SIZES = {"vera": 6, "oft": 4, "boft": 4, "adalora": 20, "prompt": 3, "prefix": 3}


def build(name, case, dtype=torch.float32, size=None, **setting):
    return ROWS[name].build(case.base(dtype), case.setting(**setting), size or SIZES[name])


def on_meta(base):
    return BaseModel(base.model.to("meta"), None, (), base.full_modules)


def randomise(model):
    """Move everything that trains, as training does."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def adapter_of(model, full_modules):
    return count_trainable(model, full_modules)[0]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16 autocast"])
@pytest.mark.parametrize("name", ROWS)
def test_every_row_learns_a_batch_and_leaves_the_base_alone(host_case, train, name, autocast):
    frozen = {n: p.clone() for n, p in host_case.base().model.named_parameters()}
    built = build(name, host_case)
    # In the prompt's own way there is no label of a virtual token in a token classifier.
    batch = host_case.batch()
    if name == "prompt" and batch["labels"].ndim == 2 and host_case.full_modules:
        losses = learn_pooled(built.model, batch, autocast)
    else:
        losses = train(built.model, batch, 5e-2, steps=20, autocast=autocast)
    assert losses[-1] < losses[0] - 0.03
    base = built.model.get_base_model()
    for key, value in frozen.items():
        if not key.startswith(host_case.full_modules or ("none",)):
            path, _, leaf = key.rpartition(".")
            module = base.get_submodule(path)
            module = getattr(module, "base_layer", module)
            assert torch.equal(getattr(module, leaf), value), key


def learn_pooled(model, batch, autocast):
    labels = batch["labels"][:, 0]
    features = {key: batch[key] for key in ("input_ids", "attention_mask")}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(20):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(**features).logits[:, -batch["input_ids"].shape[1] :]
        loss = functional.cross_entropy(pool(logits, batch["attention_mask"], "mean"), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", ROWS)
def test_what_trains_over_a_narrow_base_is_wide(host_cases, name):
    case = host_cases["language model"]
    built = build(name, case, torch.bfloat16)
    types = {p.dtype for p in built.model.parameters() if p.requires_grad}
    assert types == {torch.float32}
    loss = built.model(**case.batch()).loss
    loss.backward()
    assert torch.isfinite(loss)


@pytest.mark.parametrize("name", SITED)
def test_a_row_with_sites_starts_as_the_base(host_case, name):
    batch = host_case.batch()
    expected = host_case.base().model.eval()(**batch).logits
    logits = build(name, host_case).model.eval()(**batch).logits
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", SITED)
def test_folding_in_keeps_the_outputs_and_the_model(host_case, name):
    built = build(name, host_case)
    randomise(built.model)
    batch = host_case.batch()
    before = copy.deepcopy(built.model.state_dict())
    unmerged = built.model.eval()(**batch).logits
    merged = built.merge()
    assert type(merged) is type(host_case.base().model)
    torch.testing.assert_close(merged(**batch).logits, unmerged, rtol=1e-4, atol=1e-5)
    base = host_case.base().model(**batch).logits
    assert (unmerged - base).abs().max() > 1e-2
    assert all(torch.equal(before[key], value) for key, value in built.model.state_dict().items())


@pytest.mark.parametrize("name", PROMPTS)
def test_prompts_cannot_be_folded_in(host_cases, name):
    assert build(name, host_cases["language model"]).merge is None


@pytest.mark.parametrize("name", ROWS)
def test_as_many_train_on_meta_as_in_memory(host_case, name):
    full = host_case.full_modules
    real = build(name, host_case)
    base = on_meta(host_case.base())
    empty = ROWS[name].build(base, host_case.setting(), SIZES[name])
    assert count_trainable(empty.model, full) == count_trainable(real.model, full)
    assert {p.device.type for p in empty.model.parameters() if p.requires_grad} == {"meta"}


def test_projections_are_not_drawn_while_parameters_are_counted(host_cases):
    case = host_cases["language model"]
    model = TUNERS["vera"].build(on_meta(case.base()), case.setting(), 6).model
    assert {buffer.device.type for n, buffer in model.named_buffers() if "vera" in n} == {"meta"}


def test_vera_trains_a_vector_of_the_rank_and_one_of_the_outputs(host_case):
    targets = find_targets(host_case.base(), host_case.setting()).values()
    model = build("vera", host_case, size=5).model
    assert adapter_of(model, host_case.full_modules) == sum(5 + t.outputs for t in targets)


def test_oft_trains_the_upper_triangle_of_every_block(host_case):
    targets = find_targets(host_case.base(), host_case.setting()).values()
    model = build("oft", host_case, size=4).model
    expected = sum(t.inputs // 4 * (4 * 3 // 2) for t in targets)
    assert adapter_of(model, host_case.full_modules) == expected


def test_boft_trains_whole_blocks_of_every_factor_and_a_scale_of_the_outputs(host_case):
    targets = find_targets(host_case.base(), host_case.setting()).values()
    model = build("boft", host_case, size=4).model
    expected = sum(2 * t.inputs // 2 * 2**2 + t.outputs for t in targets)
    assert adapter_of(model, host_case.full_modules) == expected


def test_adalora_trains_half_as_many_components_again_as_it_keeps(host_case):
    targets = find_targets(host_case.base(), host_case.setting()).values()
    size = 2 * len(targets)
    model = build("adalora", host_case, size=size).model
    expected = sum(3 * (t.inputs + t.outputs + 1) for t in targets)
    assert adapter_of(model, host_case.full_modules) == expected


def test_a_prompt_trains_an_embedding_per_token(host_case):
    assert adapter_of(build("prompt", host_case).model, host_case.full_modules) == 3 * 16


def test_a_prefix_trains_keys_and_values_of_every_layer(host_case):
    width = 16 if host_case.full_modules else 8  # Llama has one head of keys for two of queries
    trained = adapter_of(build("prefix", host_case).model, host_case.full_modules)
    assert trained == 3 * 2 * 2 * width


def test_vera_scales_one_frozen_pair_for_all_sites(host_cases):
    case = host_cases["language model"]
    model = build("vera", case, torch.float64).model.double()
    randomise(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")  # 24 to 16
    other = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
    right, left = layer.vera_A["default"], layer.vera_B["default"]
    assert other.vera_A["default"] is right
    inner, outer = layer.vera_lambda_d["default"], layer.vera_lambda_b["default"]
    x = torch.randn(3, 24, dtype=torch.float64)
    change = outer.diag() @ left[:16] @ inner.diag() @ right[:, :24]
    torch.testing.assert_close(layer(x), x @ (layer.base_layer.weight + change).T)


def test_the_seed_decides_veras_projections_and_they_are_not_stored(host_cases):
    case = host_cases["language model"]
    model = build("vera", case).model
    again, other = (
        TUNERS["vera"].build(case.base(), setting, 6).model
        for setting in (case.setting(), replace_seed(case.setting(), 1))
    )
    projections = [m.base_model.vera_A["default"] for m in (model, again, other)]
    assert torch.equal(projections[0], projections[1])
    assert not torch.equal(projections[0], projections[2])
    stored = get_peft_model_state_dict(model)
    assert sum(value.numel() for value in stored.values()) == adapter_of(model, ())


def replace_seed(setting, seed):
    return type(setting)(
        setting.model, setting.adapter, setting.parameters, setting.steps, seed, setting.options
    )


def test_oft_rotates_the_inputs_of_a_site_in_blocks(host_cases):
    case = host_cases["language model"]
    model = build("oft", case, torch.float64).model.double()
    randomise(model)
    layer = model.get_submodule("base_model.model.model.layers.1.mlp.down_proj")
    blocks = []
    for entries in layer.oft_R["default"].weight:
        skew = torch.zeros(4, 4, dtype=torch.float64)
        skew[tuple(torch.triu_indices(4, 4, 1))] = entries
        skew = skew - skew.T
        blocks.append((torch.eye(4) - skew) @ torch.linalg.inv(torch.eye(4) + skew))
    rotation = torch.block_diag(*blocks)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24, dtype=torch.float64))
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ rotation @ layer.base_layer.weight.T)


def test_the_blocks_of_oft_divide_the_inputs_of_every_site(host_cases):
    case = host_cases["language model"]  # inputs of 16 and 24
    assert TUNERS["oft"].sizes(case.base(), case.setting()) == [2, 4, 8]


def test_what_a_spec_says_of_a_method_goes_to_peft(host_cases):
    case = host_cases["language model"]
    built = build("vera", case, options={"d_initial": 0.5})
    vectors = [p for n, p in built.model.named_parameters() if "vera_lambda_d" in n]
    assert all((vector == 0.5).all() for vector in vectors)
    with pytest.raises(SpecError, match="d_inital"):
        build("vera", case, options={"d_inital": 0.5})


@pytest.mark.parametrize("name", ["oft", "boft"])
def test_orthogonal_methods_refuse_transposed_weights(host_cases, transposed, name):
    setting = host_cases["language model"].setting()
    with pytest.raises(UnsupportedError, match="Conv1D"):
        SITED[name].sizes(transposed, setting)


@pytest.mark.parametrize("name", ["vera", "adalora"])
def test_the_other_tuners_take_transposed_weights(host_cases, transposed, name):
    case = host_cases["language model"]
    built = SITED[name].build(transposed, case.setting(), SIZES[name])
    randomise(built.model)
    batch = case.batch()
    logits = built.model.eval()(**batch).logits
    torch.testing.assert_close(built.merge()(**batch).logits, logits, rtol=1e-4, atol=1e-5)
