import contextlib
import copy
import gc
import io
import itertools
import weakref

import numpy as np
import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankflow
from rankflow import surgery
from rankflow.adapters import row_norms
from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.dora import accelerate_dora, accelerate_site, norms_of
from rankflow.adapters.newborns import orthogonal
from rankflow.adapters.row_norms import row_norms_of_sum
from rankflow.adapters.sites import find_sites
from rankflow.engine import RankFlow
from rankflow.errors import SiteError
from rankflow.export.peft import export_adapter
from rankflow.records import RankPlan
from rankflow.specs.budget import BudgetSpec

EXACT = 1e-9  # what float64 must keep, relative to the largest entry
FACTORS = ["lora_A.default.weight", "lora_B.default.weight", "lora_magnitude_vector.default.weight"]
# Each mode's precision: base, adapters, autocast; and the error allowed against float64.
SINGLE = 1e-5  # 80 roundings of 2^-23, for sums of up to 60 terms and a factor c of up to 3
# Inputs, factors, c, base and branch are rounded to 8 bits, half an ulp each, before they are
# summed, and their sum is up to three times smaller than its largest term: 6 * 2^-9 * 3.
HALF = 0.035
MODES = {
    "float32": (torch.float32, torch.float32, False, SINGLE),
    "bf16": (torch.bfloat16, torch.bfloat16, False, HALF),
    "bf16 under float32 adapters": (torch.bfloat16, torch.float32, False, HALF),
    "autocast": (torch.float32, torch.float32, True, HALF),
    "autocast over bf16": (torch.bfloat16, torch.float32, True, HALF),
}


def to(dtype, x):
    return x.to(dtype) if x.is_floating_point() else x


def gap(mine, expected):
    """The largest difference, relative to the largest expected entry."""
    mine, expected = mine.detach().double(), expected.detach().double()
    assert mine.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    difference, size = (mine - expected).abs().max().item(), expected.abs().max().item()
    return difference / size if size else difference


def outcome(model, x, *, autocast=False, **arguments):
    """Output and gradients, where every entry of the output counts by a random weight."""
    x = x.detach().clone().requires_grad_() if x.is_floating_point() else x
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x, **arguments)
        out = out if isinstance(out, torch.Tensor) else out.logits
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    (out * weights.to(out.dtype)).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if x.is_floating_point():
        grads["x"] = x.grad
    return {"output": out.detach()} | grads


def gaps(mine, expected):
    assert mine.keys() == expected.keys()
    return {name: gap(mine[name], expected[name]) for name in expected}


def agree(mine, expected, tolerance=EXACT):
    """Whether outputs and gradients agree; says where they do not."""
    wrong = {n: value for n, value in gaps(mine, expected).items() if not value <= tolerance}
    assert not wrong
    return True


def ours_and_pefts(model, adapter_name="default"):
    """The model with our DoRA, and a copy with PEFT's."""
    stock = copy.deepcopy(model)
    accelerate_dora(model, adapter_name)
    return model, stock


def variants(model, adapter_name="default"):
    return [site.layer.lora_variant[adapter_name] for site in find_sites(model, adapter_name)]


def dense_norms(model, adapter_name="default"):
    """Norms of all rows of all sites in float64, from the dense sum."""
    norms = []
    for site in find_sites(model, adapter_name):
        weight = site.layer.get_base_layer().weight.detach().double()
        if site.kind == "embedding" or getattr(site.layer, "fan_in_fan_out", False):
            weight = weight.T
        update = site.B.detach().flatten(1).double() @ site.A.detach().flatten(1).double()
        norms.append((weight.flatten(1) + site.scale * update).square().sum(1).sqrt())
    return torch.cat(norms)


def seed():
    return torch.Generator().manual_seed(3)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


@pytest.fixture
def dora_model(host, adapt):
    """Make a float64 DoRA model around one layer of a case."""
    return lambda case, **config: adapt(host(case), use_dora=True, **config).double()


@pytest.fixture
def norms_taken(monkeypatch):
    """A list that grows by an entry for every norm that is computed."""
    taken = []
    compute = row_norms.row_norms_of_sum

    def count(*arguments, **settings):
        taken.append(arguments[0].shape)
        return compute(*arguments, **settings)

    monkeypatch.setattr(row_norms, "row_norms_of_sum", count)
    return taken


# Which sites


def test_every_dora_site_is_accelerated_and_counted(mixed):
    model = mixed(use_dora=True)
    before = [type(variant) for variant in variants(model)]
    assert rankflow.accelerate_dora(model) == 5
    for variant, stock in zip(variants(model), before, strict=True):
        assert isinstance(variant, stock)  # merging and whatever asks for PEFT's class go on
        assert type(variant).__module__ == "rankflow.adapters.dora"


def test_accelerating_twice_is_harmless(mixed):
    model = mixed(use_dora=True).double()
    accelerate_dora(model)
    tokens = torch.randint(12, (3, 4))
    once, kinds = outcome(model, tokens), [type(v) for v in variants(model)]
    assert accelerate_dora(model) == 5
    assert [type(v) for v in variants(model)] == kinds
    assert agree(outcome(model, tokens), once, 0.0)


def test_an_adapter_without_dora_is_refused(mixed, adapt, host, layer_cases):
    with pytest.raises(SiteError, match="DoRA"):
        accelerate_dora(mixed())
    model = adapt(host(layer_cases["linear"]), use_dora=True)
    with pytest.raises(SiteError, match="other"):
        accelerate_dora(model, "other")
    with pytest.raises(SiteError):
        accelerate_dora(nn.Linear(2, 2))


def test_the_model_is_otherwise_untouched(mixed):
    model, stock = ours_and_pefts(mixed(use_dora=True))
    assert repr(model) == repr(stock)
    assert list(model.state_dict()) == list(stock.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in stock.named_modules()]
    stored, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(stock)
    assert stored.keys() == expected.keys()
    assert all(torch.equal(stored[key], expected[key]) for key in expected)


# The mathematics in float64


@pytest.mark.parametrize("grad_of_base", [False, True], ids=["frozen base", "trained base"])
def test_outputs_and_all_gradients_are_pefts(grad_of_base, layer_case, dora_model):
    model = dora_model(layer_case)
    for p in find_sites(model)[0].layer.get_base_layer().parameters():
        p.requires_grad_(grad_of_base)
    model, stock = ours_and_pefts(model)
    x = to(torch.float64, layer_case.inputs())
    mine = outcome(model, x)
    assert agree(mine, outcome(stock, x))
    assert len([name for name in mine if ".lora_" in name]) == 3


@pytest.mark.parametrize("shape", [(4, 6), (2, 3, 6), (2, 1, 3, 6), (0, 6), (1, 6), (2, 0, 6)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["linear", "Conv1D of transformers"])
def test_inputs_of_every_shape_are_taken(kind, bias, shape, layer_cases, host, adapt):
    case = layer_cases[kind]
    base = host(case)
    base.block["layer"] = layer = nn.Linear(6, 5, bias=bias) if kind == "linear" else case.make()
    if kind != "linear":
        layer.weight.data = torch.randn(6, 5)
        layer.bias.data = torch.randn(5) * bias
        layer.nx, layer.nf = 6, 5
    model, stock = ours_and_pefts(adapt(base, use_dora=True).double())
    x = torch.randn(shape, dtype=torch.float64)
    assert agree(outcome(model, x), outcome(stock, x))


def test_a_single_vector_is_a_batch_of_one(layer_cases, dora_model):
    model, _ = ours_and_pefts(dora_model(layer_cases["linear"]))
    x = torch.randn(find_sites(model)[0].in_features, dtype=torch.float64)
    alone, batch = outcome(model, x), outcome(model, x[None])
    assert alone["output"].shape == batch["output"].shape[1:]
    for name in ("output", "x"):
        batch[name] = batch[name][0]
    assert agree(alone, batch)


def test_inputs_and_gradients_need_not_be_contiguous(layer_cases, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_cases["linear"]))
    results = []
    for each in (model, stock):
        x = torch.randn(6, 3, 4, dtype=torch.float64, generator=seed()).requires_grad_()
        out = each(x.permute(2, 1, 0)[::2])
        out.transpose(0, 2)[1:].sum().backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        results.append({"output": out, "x": x.grad} | grads)
    assert agree(*results)


@pytest.mark.parametrize("trained", ["lora_A", "lora_B", "magnitude", "x", "nothing"])
def test_only_what_is_trained_gets_a_gradient(trained, layer_case, dora_model):
    model = dora_model(layer_case)
    parts = {"lora_A": ("lora_A", "embedding_A"), "lora_B": ("lora_B", "embedding_B")}
    wanted = parts.get(trained, (trained,))
    for name, p in model.named_parameters():
        p.requires_grad_(any(part in name for part in wanted))
    model, stock = ours_and_pefts(model)
    x = to(torch.float64, layer_case.inputs())
    if trained == "x" and not x.is_floating_point():
        return
    results = []
    for each in (model, stock):
        inputs = x.clone().requires_grad_(trained == "x")
        out = each(inputs)
        assert out.requires_grad == (trained != "nothing")
        if trained != "nothing":
            out.pow(3).sum().backward()
        grads = {n: p.grad for n, p in each.named_parameters() if p.grad is not None}
        results.append({"output": out} | ({"x": inputs.grad} if trained == "x" else grads))
    assert len(results[1]) == (1 if trained == "nothing" else 2)
    assert agree(*results)


def curvature(model, x):
    """The gradient of the input's gradient's length."""
    x = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).pow(3).sum(), x, create_graph=True)
    slope.square().sum().backward()
    return x.grad


def test_a_second_derivative_is_pefts_or_refused(layer_case, dora_model):
    if layer_case.kind == "embedding":
        pytest.skip("tokens have no gradient")
    model, stock = ours_and_pefts(dora_model(layer_case))
    x = layer_case.inputs().double()
    if layer_case.kind == "linear":
        with pytest.raises(RuntimeError, match="once_differentiable"):
            curvature(model, x)
    else:
        assert gap(curvature(model, x), curvature(stock, x)) <= EXACT


@pytest.mark.parametrize("settings", [{"padding_idx": 2}, {"scale_grad_by_freq": True}])
def test_special_embeddings_are_pefts(settings, layer_cases, host, adapt):
    base = host(layer_cases["embedding"])
    base.block["layer"] = nn.Embedding(11, 6, **settings)
    model, stock = ours_and_pefts(adapt(base, use_dora=True).double())
    tokens = torch.tensor([[1, 2, 2, 10], [0, 1, 1, 1]])
    assert agree(outcome(model, tokens), outcome(stock, tokens))


def test_a_scaled_embedding_is_pefts(host, adapt, layer_cases):
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

    base = host(layer_cases["embedding"])
    base.block["layer"] = Gemma3TextScaledWordEmbedding(11, 6, padding_idx=0, embed_scale=3.0)
    model, stock = ours_and_pefts(adapt(base, use_dora=True).double())
    tokens = torch.randint(11, (3, 4))
    assert agree(outcome(model, tokens), outcome(stock, tokens))


def test_whole_transformers_are_pefts(transformer, adapt):
    base = adapt(transformer(), target_modules="all-linear", use_dora=True).double()
    model, stock = ours_and_pefts(base)
    tokens = torch.randint(3, 13, (2, 7))
    assert agree(outcome(model, tokens), outcome(stock, tokens))


def test_a_net_of_every_kind_of_layer_is_pefts(mixed):
    model, stock = ours_and_pefts(mixed(use_dora=True).double())
    tokens = torch.randint(12, (3, 4))
    assert agree(outcome(model, tokens), outcome(stock, tokens))


def test_the_output_may_be_changed_in_place(layer_case, dora_model):
    class Rectified(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return functional.relu_(self.model(x))

    model, stock = (Rectified(each) for each in ours_and_pefts(dora_model(layer_case)))
    x = to(torch.float64, layer_case.inputs())
    assert agree(outcome(model, x), outcome(stock, x))


def test_neither_input_nor_base_output_is_changed(layer_case, dora_model):
    model = dora_model(layer_case)
    accelerate_dora(model)
    seen = []
    base = find_sites(model)[0].layer.get_base_layer()
    base.register_forward_hook(lambda _m, _x, out: seen.extend([out, out.detach().clone()]))
    x = to(torch.float64, layer_case.inputs())
    before = x.clone()
    outcome(model, x)
    assert torch.equal(x, before)
    assert torch.equal(seen[0], seen[1])


# Lower precision against float64


@pytest.mark.parametrize(("base", "adapter", "autocast", "bound"), MODES.values(), ids=MODES.keys())
def test_lower_precision_stays_near_float64(
    base, adapter, autocast, bound, layer_case, host, adapt
):
    model = adapt(host(layer_case).to(base), use_dora=True)
    for site in find_sites(model):
        for p in (site.A, site.B, site.magnitude):
            p.data = p.data.to(adapter)
    model, stock = ours_and_pefts(model)
    x = to(base, layer_case.inputs())
    mine = outcome(model, x, autocast=autocast)
    plain = outcome(stock, x, autocast=autocast)
    assert {n: g.dtype for n, g in mine.items()} == {n: g.dtype for n, g in plain.items()}
    exact = outcome(stock.double(), to(torch.float64, x))
    assert agree(mine, exact, bound)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_wide_layer_is_no_less_exact_than_pefts(mode, bias, adapt, host, layer_cases):
    base_type, adapter, autocast, _ = MODES[mode]
    base = host(layer_cases["linear"])
    base.block["layer"] = nn.Linear(256, 192, bias=bias)
    model = adapt(base.to(base_type), use_dora=True, r=8, lora_alpha=8)
    (site,) = find_sites(model)
    site.A.data, site.B.data = 0.06 * torch.randn(8, 256), 0.1 * torch.randn(192, 8)
    site.magnitude.data = dense_norms(model).float() * (1 + 0.1 * torch.randn(192))
    for p in (site.A, site.B, site.magnitude):
        p.data = p.data.to(adapter)
    model, stock = ours_and_pefts(model)
    x = torch.randn(8, 32, 256, dtype=base_type)
    mine = outcome(model, x, autocast=autocast)
    plain = outcome(stock, x, autocast=autocast)
    exact = outcome(stock.double(), x.double())
    # PEFT computes in float32 wherever an adapter is float32, outside of autocast; we compute in
    # the base's type there, and owe the bf16 rounding of the three operands of the branch and of
    # its two products, 5 * 2^-9.
    own = 5 * 2.0**-9 if base_type == torch.bfloat16 or autocast else 1e-6
    theirs = gaps(plain, exact)
    assert {n: e for n, e in gaps(mine, exact).items() if not e <= max(own, 1.5 * theirs[n])} == {}


# Norms


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (257, 3), (3, 257), (700, 130), (5, 40_000)])
@pytest.mark.parametrize("rank", [1, 5])
def test_norms_are_those_of_the_dense_sum_for_every_shape(rank, shape, axis):
    rows, columns = shape
    W, A, B = torch.randn(shape), torch.randn(rank, columns), torch.randn(rows, rank)
    W, A, B = W.double(), A.double(), B.double()
    dense = (W - 0.7 * B @ A).square().sum(1).sqrt()
    norms = row_norms_of_sum(W if axis == 0 else W.T, A, B, -0.7, axis=axis)
    torch.testing.assert_close(norms, dense, rtol=1e-13, atol=0)
    contiguous = row_norms_of_sum(W if axis == 0 else W.T.contiguous(), A, B, -0.7, axis=axis)
    torch.testing.assert_close(contiguous, dense, rtol=1e-13, atol=0)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("noise", [1.0, 0.3, 0.1, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_norms_stay_exact_however_much_cancels(share, noise, rank, axis):
    A, B = torch.randn(rank, 300), torch.randn(90, rank)
    W = -share * 2.0 * (B @ A) + noise * torch.randn(90, 300)
    exact = (W.double() + 2.0 * B.double() @ A.double()).square().sum(1).sqrt()
    dense = torch.linalg.norm(W + 2.0 * (B @ A), dim=1)
    norms = row_norms_of_sum(W if axis == 0 else W.T, A, B, 2.0, axis=axis)
    assert norms.dtype == torch.float32
    own = (dense.double() / exact - 1).abs().max()
    assert (norms.double() / exact - 1).abs().max() <= max(1e-4, 4 * own)


@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 8])
@pytest.mark.parametrize("noise", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.4, 0.6, 0.9, 1.0])
def test_norms_of_bf16_weights_are_below_bf16_rounding(share, noise, rank, adapter):
    A, B = torch.randn(rank, 300).to(adapter), torch.randn(90, rank).to(adapter)
    W = -share * 2.0 * (B.float() @ A.float()) + noise * torch.randn(90, 300)
    W = W.bfloat16()
    exact = (W.double() + 2.0 * B.double() @ A.double()).square().sum(1).sqrt()
    norms = row_norms_of_sum(W, A, B, 2.0)
    assert norms.dtype == torch.float32
    assert (norms.double() / exact - 1).abs().max() <= 2.0**-9


def test_a_sum_that_cancels_wholly_has_a_norm_above_zero():
    A, B = torch.ones(2, 5), torch.ones(4, 2)
    norms = row_norms_of_sum(-2 * torch.ones(4, 5), A, B, 1.0)
    assert torch.isfinite(norms).all()
    assert (norms > 0).all()


def test_norms_of_float16_weights_do_not_overflow():
    W, A, B = torch.full((3, 40), 300.0), torch.zeros(1, 40), torch.zeros(3, 1)
    norms = row_norms_of_sum(W.half(), A.half(), B.half(), 1.0)
    torch.testing.assert_close(norms, torch.full((3,), 300 * 40**0.5))


# Rows of zeros and magnitudes near zero


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude", [0.0, 1.0, 30.0])
@pytest.mark.parametrize("row", [0.0, 1e-30], ids=["zero row", "tiny row"])
def test_a_row_without_length_gives_finite_numbers(row, magnitude, dtype, layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True)
    (site,) = find_sites(model)
    weight = layer_case.matrix(site.layer.get_base_layer().weight.detach()).clone()
    weight[1] = row
    weight = layer_case.weight_like(weight, site.layer.get_base_layer().weight.detach())
    site.layer.get_base_layer().weight.data = weight.clone()
    site.B.data[1] = 0
    site.magnitude.data.view(-1)[1] = magnitude
    model = model.to(dtype)
    accelerate_dora(model)
    x = to(dtype, layer_case.inputs())
    result = outcome(model, x)
    assert all(torch.isfinite(value).all() for value in result.values())
    if row == 0.0:
        channel = -1 if layer_case.kind in ("linear", "embedding") else 1
        bias = getattr(site.layer.get_base_layer(), "bias", None)
        out = result["output"].select(channel, 1)
        expected = torch.zeros_like(out) if bias is None else bias[1].expand_as(out)
        # One rounding of the sum with the bias.
        torch.testing.assert_close(out, expected, rtol=2 * torch.finfo(dtype).eps, atol=0)


def test_a_zero_row_learns_from_its_birth(layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True)
    (site,) = find_sites(model)
    base = site.layer.get_base_layer()
    weight = layer_case.matrix(base.weight.detach()).clone()
    weight[0] = 0
    base.weight.data = layer_case.weight_like(weight, base.weight.detach()).clone()
    model, stock = ours_and_pefts(model.double())
    x = to(torch.float64, layer_case.inputs())
    assert agree(outcome(model, x), outcome(stock, x))  # B's row gives the sum a length


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-22, -1e-20, 1e-12, -1e-8, 1e-5, -0.5])
def test_a_magnitude_near_zero_has_the_right_gradient(value, layer_case, dora_model):
    model = dora_model(layer_case)
    site = find_sites(model)[0]
    site.magnitude.data.view(-1)[::2] = value
    model, stock = ours_and_pefts(model)
    x = to(torch.float64, layer_case.inputs())
    mine, theirs = outcome(model, x), outcome(stock, x)
    assert agree(mine, theirs)
    (name,) = [n for n in mine if "magnitude" in n]
    small, expected = mine[name].flatten()[::2], theirs[name].flatten()[::2]
    assert expected.abs().min() > 0
    assert gap(small, expected) <= EXACT


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, -1e-5, 1e-3])
def test_a_magnitude_near_zero_has_the_right_gradient_in_float32(value, layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True)
    find_sites(model)[0].magnitude.data[...] = value
    model, stock = ours_and_pefts(model)
    x = layer_case.inputs()
    mine, exact = outcome(model, x), outcome(stock.double(), to(torch.float64, x))
    (name,) = [n for n in mine if "magnitude" in n]
    assert exact[name].abs().max() > 0
    assert gap(mine[name], exact[name]) <= SINGLE
    # The other gradients are as small as the magnitude, far below the output's rounding.
    assert all(torch.isfinite(value).all() for value in mine.values())


def test_a_large_bias_costs_the_magnitude_no_more_digits_than_in_peft(layer_cases, host, adapt):
    model = adapt(host(layer_cases["linear"]), use_dora=True)
    find_sites(model)[0].layer.get_base_layer().bias.data *= 1e3
    model, stock = ours_and_pefts(model)
    x = layer_cases["linear"].inputs()
    mine, plain = outcome(model, x), outcome(stock, x)
    exact = outcome(stock.double(), x.double())
    (name,) = [n for n in mine if "magnitude" in n]
    # Both take the bias off a sum that has lost digits to it: 1e3 roundings of 2^-24.
    assert gap(mine[name], exact[name]) <= max(4 * gap(plain[name], exact[name]), 1e3 * 2.0**-23)


# Dropout


@pytest.mark.parametrize("bias", [False, True])
def test_dropout_acts_on_the_low_rank_branch_alone(bias, host, adapt, layer_cases):
    base = host(layer_cases["linear"])
    base.block["layer"] = nn.Linear(6, 5, bias=bias)
    model = adapt(base, use_dora=True, lora_dropout=0.4).double()
    accelerate_dora(model)
    (site,) = find_sites(model)
    x = torch.randn(50, 6, dtype=torch.float64)
    torch.manual_seed(11)
    mine = outcome(model, x)
    torch.manual_seed(11)
    mask = functional.dropout(torch.ones_like(x), 0.4)
    assert 0.2 < (mask == 0).double().mean() < 0.6

    leaves = [p.detach().clone().requires_grad_() for p in (x, site.A, site.B, site.magnitude)]
    inputs, A, B, magnitude = leaves
    frozen = site.layer.get_base_layer()
    c = magnitude / dense_norms(model)
    out = c * (inputs @ frozen.weight.T) + c * site.scale * ((inputs * mask) @ A.T @ B.T)
    out = out if frozen.bias is None else out + frozen.bias
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).double()
    (out * weights).sum().backward()
    names = ["x", *(f"base_model.model.block.layer.{k}" for k in FACTORS)]
    assert agree(mine, {"output": out} | dict(zip(names, [p.grad for p in leaves], strict=True)))


@pytest.mark.parametrize("kind", ["linear", "Conv1D of transformers", "conv2d"])
def test_the_mean_over_dropout_masks_is_the_output_without_dropout(kind, dora_model, layer_cases):
    model, stock = ours_and_pefts(dora_model(layer_cases[kind], lora_dropout=0.3))
    x = to(torch.float64, layer_cases[kind].inputs())[:1]
    many = x.repeat(20_000, *[1] * (x.ndim - 1))
    with torch.no_grad():
        expected = stock.eval()(x)[0]
        for each in (model.train(), stock.train()):
            outputs = each(many)
            deviation = outputs.std(0) / len(many) ** 0.5
            assert deviation.max() > 0
            assert ((outputs.mean(0) - expected).abs() <= 5 * deviation + 1e-12).all()


def test_dropout_needs_no_second_product_with_the_base_weight(dora_model, layer_cases):
    model, stock = ours_and_pefts(dora_model(layer_cases["linear"], lora_dropout=0.3))
    x = torch.randn(4, 6, dtype=torch.float64)
    counts = []
    for each in (model, stock):
        each(x)
        storage = find_sites(each)[0].layer.get_base_layer().weight.untyped_storage().data_ptr()
        with Watch() as watch:
            each(x)
        counts.append(watch.products_with(storage))
    assert counts == [1, 2]


def test_dropout_rests_in_eval_mode(layer_case, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_case, lora_dropout=0.5))
    x = to(torch.float64, layer_case.inputs())
    state = torch.get_rng_state()
    assert agree(outcome(model.eval(), x), outcome(stock.eval(), x))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_embedding_drops_nothing_as_in_peft(dora_model, layer_cases):
    model, stock = ours_and_pefts(dora_model(layer_cases["embedding"], lora_dropout=0.5))
    tokens = layer_cases["embedding"].inputs()
    assert agree(outcome(model.train(), tokens), outcome(stock.train(), tokens))


# Several adapters, switching and merging


def add(model, adapt, name, **config):
    return adapt(None, onto=model, adapter=name, **config).double()


@pytest.mark.parametrize("active", [["default"], ["other"], ["default", "other"]])
@pytest.mark.parametrize("other_is_dora", [False, True])
@pytest.mark.parametrize("accelerated", [("default",), ("other",), ("default", "other")])
def test_adapters_beside_each_other_are_pefts(
    accelerated, other_is_dora, active, layer_case, dora_model, adapt
):
    if "other" in accelerated and not other_is_dora:
        return
    model = add(dora_model(layer_case), adapt, "other", r=2, use_dora=other_is_dora)
    stock = copy.deepcopy(model)
    for name in accelerated:
        assert accelerate_dora(model, name) == 1
    x = to(torch.float64, layer_case.inputs())
    for each in (model, stock):
        each.base_model.set_adapter(active)
    assert agree(outcome(model, x), outcome(stock, x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bf16 base"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_an_adapter_that_comes_later_is_pefts(use_dora, dtype, layer_case, host, adapt):
    base = host(layer_case).to(dtype)
    model = adapt(base, use_dora=True)
    model, stock = ours_and_pefts(model)
    results = []
    x = to(dtype, layer_case.inputs())
    for each in (model, stock):
        outcome(each, x)
        torch.manual_seed(7)
        adapt(None, onto=each, adapter="later", r=2, use_dora=use_dora)
        for active in (["later"], ["default", "later"]):
            each.base_model.set_adapter(active)
            results.append(outcome(each, x))
    for mine, theirs in zip(results[:2], results[2:], strict=True):
        if dtype == torch.float64:
            assert agree(mine, theirs)
        else:  # each is within the bound of the exact output
            assert gap(mine["output"], theirs["output"]) <= 2 * HALF


def test_a_disabled_adapter_leaves_the_base_layer_and_comes_back(layer_case, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_case))
    x = to(torch.float64, layer_case.inputs())
    adapted = model(x)
    with model.disable_adapter():
        assert torch.equal(model(x), find_sites(model)[0].layer.get_base_layer()(x))
    assert torch.equal(model(x), adapted)
    assert gap(adapted, stock(x)) <= EXACT


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_changes_no_output_and_is_undone(safe_merge, layer_case, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_case))
    x = to(torch.float64, layer_case.inputs())
    before = model(x)
    for each in (model, stock):
        each.merge_adapter(safe_merge=safe_merge)
    weights = [find_sites(each)[0].layer.get_base_layer().weight for each in (model, stock)]
    assert torch.equal(*weights)
    assert gap(model(x), before) <= EXACT
    model.unmerge_adapter()
    stock.unmerge_adapter()
    assert agree(outcome(model, x), outcome(stock, x))
    model.merge_adapter()
    with model.disable_adapter():  # unmerges by itself
        base = model(x)
    assert gap(base, find_sites(model)[0].layer.get_base_layer()(x)) <= EXACT
    assert gap(model.merge_and_unload()(x), before) <= EXACT


def test_several_adapters_merge_as_in_peft(layer_case, dora_model, adapt):
    model = add(dora_model(layer_case), adapt, "other", r=2, use_dora=True)
    stock = copy.deepcopy(model)
    accelerate_dora(model)
    accelerate_dora(model, "other")
    x = to(torch.float64, layer_case.inputs())
    for each in (model, stock):
        each.base_model.set_adapter(["default", "other"])
        each(x)
        each.merge_adapter()
    assert gap(model(x), stock(x)) <= EXACT
    for each in (model, stock):
        each.unmerge_adapter()
    assert gap(model(x), stock(x)) <= EXACT


# Dead sites


def plan(keep, births):
    return RankPlan((np.array(keep, dtype=np.int64),), np.array([births]))


def test_a_dead_site_stays_dead_and_revives_into_ours(layer_case, dora_model):
    model = dora_model(layer_case)
    surgery.resize(find_sites(model), plan([], 0), None, orthogonal(seed()))
    assert accelerate_dora(model) == 1
    ((variant,),) = [variants(model)]
    assert isinstance(variant, DeadVariant)
    assert type(variant.revived).__module__ == "rankflow.adapters.dora"
    model(to(torch.float64, layer_case.inputs()))
    surgery.resize(find_sites(model), plan([], 2), None, orthogonal(seed()))
    assert type(variants(model)[0]).__module__ == "rankflow.adapters.dora"


@pytest.mark.parametrize("accelerated", ["alive", "dead", "before each"])
def test_a_site_that_died_and_came_back_is_pefts(accelerated, layer_case, dora_model):
    model = dora_model(layer_case)
    stock = copy.deepcopy(model)
    x = to(torch.float64, layer_case.inputs())
    if accelerated != "dead":
        accelerate_dora(model)
    model(x)
    for each in (model, stock):
        surgery.resize(find_sites(each), plan([], 0), None, orthogonal(seed()))
    if accelerated != "alive":
        accelerate_dora(model)
    assert agree(outcome(model, x), outcome(stock, x))
    for each in (model, stock):
        surgery.resize(find_sites(each), plan([], 2), None, orthogonal(seed()))
        for p in (find_sites(each)[0].A, find_sites(each)[0].B):
            p.data = torch.randn(p.shape, generator=seed()).double()
    assert agree(outcome(model, x), outcome(stock, x))


# The cache of norms: each change would show if the norms stayed those of before.


def step_with(make, *, of_base=False):
    def change(model):
        (site,) = find_sites(model)
        site.layer.get_base_layer().weight.requires_grad_(of_base)
        optimizer = make(trainable(model))
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            model(example(site)).square().sum().backward()
        optimizer.step()

    return change


def foreach(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, foreach=True)


def fused(parameters):
    return torch.optim.AdamW(parameters, lr=0.1, fused=True)


def example(site):
    """A float64 input for any kind of site."""
    if site.kind == "embedding":
        return torch.randint(11, (3, 4), generator=seed())
    shape = (2, 3, 8, 7) if site.kind == "conv" else (4, site.in_features)
    return torch.randn(shape, generator=seed(), dtype=torch.float64)


def with_tensor(name, act):
    """A change to A, B or the base weight W of the only site."""

    def change(model):
        (site,) = find_sites(model)
        tensor = {"A": site.A, "B": site.B, "W": site.layer.get_base_layer().weight}[name]
        noise = torch.randn(tensor.shape, generator=seed(), dtype=tensor.dtype)
        act(tensor, noise)

    return change


def swap_data(tensor, noise):
    tensor.data = tensor.data + noise


def swap_data_twice(tensor, noise):
    tensor.data = tensor.data + noise
    tensor.data = tensor.data + noise  # the memory of the first may be in use again


def write_in_place(tensor, noise):
    with torch.no_grad():
        tensor.add_(noise)


def write_through_data(tensor, noise):
    tensor.data.add_(noise)  # as averages of weights (EMA) are put in


def new_parameters(times):
    def change(model):
        (site,) = find_sites(model)
        generator = seed()
        for _ in range(times):
            pair = [torch.randn(p.shape, generator=generator) for p in (site.A, site.B)]
            site.install(*(nn.Parameter(p.double()) for p in pair))

    return change


def resize(keep, births, times=1, in_place=False):
    def change(model):
        for _ in range(times):
            if in_place:
                surgery.resize_in_place(find_sites(model), plan(keep, births), orthogonal(seed()))
            else:
                surgery.resize(find_sites(model), plan(keep, births), None, orthogonal(seed()))

    return change


def die_and_return(model):
    resize([], 0)(model)
    resize([], 3)(model)
    with_tensor("B", write_in_place)(model)
    with_tensor("A", write_in_place)(model)


def others(state):
    generator = seed()
    return {
        key: torch.randn(value.shape, generator=generator, dtype=value.dtype)
        for key, value in state.items()
    }


def load_everything(model):
    model.load_state_dict(others(model.state_dict()))


def load_and_assign(model):
    model.load_state_dict(others(model.state_dict()), assign=True)


def load_adapter(model):
    set_peft_model_state_dict(model, others(get_peft_model_state_dict(model)))


def load_base(model):
    base = find_sites(model)[0].layer.get_base_layer()
    base.load_state_dict(others(base.state_dict()))


def set_scale(model):
    find_sites(model)[0].layer.set_scale("default", 2)


def scale_layer(model):
    find_sites(model)[0].layer.scaling["default"] *= 3


def unmerge_otherwise(model):
    """The unmerged weight is not what it was, if the magnitudes moved meanwhile."""
    model.merge_adapter()
    find_sites(model)[0].magnitude.data *= 0.8
    model.unmerge_adapter()


def round_to_bf16(model):
    model.bfloat16().double()


def move_and_load(model):
    state = others(model.state_dict())
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict(state)


CHANGES = {
    "AdamW foreach": step_with(foreach),
    "AdamW fused": step_with(fused),
    "AdamW foreach of the base too": step_with(foreach, of_base=True),
    "AdamW fused of the base too": step_with(fused, of_base=True),
    "AdamW one by one": step_with(lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False)),
    "SGD": step_with(lambda p: torch.optim.SGD(p, lr=0.1)),
    "SGD fused": step_with(lambda p: torch.optim.SGD(p, lr=0.1, fused=True)),
    **{
        f"{act.__name__.replace('_', ' ')} of {name}": with_tensor(name, act)
        for act in (swap_data, swap_data_twice, write_in_place)
        for name in "ABW"
    },
    "new parameters": new_parameters(1),
    "new parameters twice": new_parameters(2),
    "shrinking": resize([0, 2], 0),
    "exchange of a component": resize([1, 2], 1),
    "exchange of a component twice": resize([1, 2], 1, times=2),
    "exchange in place": resize([1, 2], 1, in_place=True),
    "exchange in place twice": resize([1, 2], 1, times=2, in_place=True),
    "death and return": die_and_return,
    "load_state_dict": load_everything,
    "load_state_dict that assigns": load_and_assign,
    "loading an adapter": load_adapter,
    "loading the base weight": load_base,
    "set_scale": set_scale,
    "scaling": scale_layer,
    "merging and unmerging": unmerge_otherwise,
    "rounding to bf16 and back": round_to_bf16,
    "moving and loading": move_and_load,
}


@pytest.mark.parametrize("grad", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
@pytest.mark.parametrize("kind", ["linear", "conv2d", "embedding"])
def test_the_norms_follow(kind, change, grad, layer_cases, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_cases[kind]).train(grad))
    (site,) = find_sites(stock)
    x = example(site)
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert gap(model(x), stock(x)) <= EXACT
    before = dense_norms(stock)
    for each in (model, stock):
        torch.manual_seed(1)
        change(each)
        each.train(grad)
    # A hundred times what the outputs may differ by, so that stale norms cannot pass.
    assert (dense_norms(stock) / before - 1).abs().max() > 100 * EXACT
    assert gap(dense_norms(model), dense_norms(stock)) <= EXACT
    with torch.set_grad_enabled(grad):
        assert gap(model(x), stock(x)) <= EXACT


def test_the_norms_follow_a_deleted_adapter_of_the_same_name(layer_case, host, adapt):
    model = adapt(host(layer_case).double(), use_dora=True, adapter="other").double()
    x = to(torch.float64, layer_case.inputs())
    for _ in range(3):
        add(model, adapt, "default", use_dora=True)
        accelerate_dora(model)
        model.set_adapter("default")
        stock = copy.deepcopy(model)
        for site in find_sites(stock):
            stock_class = type(site.layer.lora_variant["default"]).__mro__
            (peft_class,) = [c for c in stock_class[1:] if "Dora" in c.__name__][:1]
            site.layer.lora_variant["default"] = peft_class()
        assert gap(model(x), stock(x)) <= EXACT
        model.set_adapter("other")
        model.delete_adapter("default")


def test_a_copy_has_norms_of_its_own(layer_case, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_case))
    x = to(torch.float64, layer_case.inputs())
    before = model(x)
    twin = copy.deepcopy(model)
    for each in (twin, stock):
        with_tensor("B", write_in_place)(each)
    assert gap(twin(x), stock(x)) <= EXACT
    assert torch.equal(model(x), before)


def test_a_model_can_be_stored_as_a_whole(layer_case, dora_model):
    model = dora_model(layer_case)
    accelerate_dora(model)
    x = to(torch.float64, layer_case.inputs())
    before = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), before)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("first", ["no_grad", "inference_mode", "eval", "autocast"])
def test_training_goes_on_after_a_look_without_gradients(
    first, bias, layer_case, host, adapt, dora_model
):
    model, stock = ours_and_pefts(dora_model(layer_case))
    x = to(torch.float64, layer_case.inputs())
    look = {
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "eval": contextlib.nullcontext,
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    }[first]
    model.train(first != "eval")
    with look():
        model(x)
    assert agree(outcome(model.train(), x), outcome(stock, x))


def test_inference_mode_gives_the_same_output(layer_case, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_case).eval())
    x = to(torch.float64, layer_case.inputs())
    for _ in range(2):
        with torch.inference_mode():
            assert gap(model(x), stock(x)) <= EXACT
        assert gap(model(x), stock(x)) <= EXACT


def test_a_model_made_in_inference_mode_runs(layer_case, dora_model):
    with torch.inference_mode():
        model, stock = ours_and_pefts(dora_model(layer_case).eval())
        x = to(torch.float64, layer_case.inputs())
        for _ in range(2):
            assert gap(model(x), stock(x)) <= EXACT


@pytest.fixture
def dora_llama(llama, adapt):
    """A float64 Llama with DoRA on its 14 linear layers, and tokens."""
    model = adapt(llama(), target_modules="all-linear", use_dora=True).double()
    return model, torch.randint(13, (2, 7))


def test_one_norm_serves_all_micro_batches_of_a_step(dora_llama, norms_taken):
    model, tokens = dora_llama
    accelerate_dora(model)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    for steps in (1, 2):
        for _ in range(3):
            model(tokens, labels=tokens).loss.backward()
        assert len(norms_taken) == 14 * steps
        optimizer.step()
        optimizer.zero_grad()


def test_accelerating_a_site_again_keeps_its_norms(layer_case, dora_model, norms_taken):
    model = dora_model(layer_case)
    (site,) = find_sites(model)
    x = to(torch.float64, layer_case.inputs())
    seen = []
    for _ in range(3):
        accelerate_site(site)
        model(x)
        seen += variants(model)
    assert len(norms_taken) == 1
    assert seen[0] is seen[1] is seen[2]
    accelerate_dora(model)  # forgets
    model(x)
    assert len(norms_taken) == 2


def test_norms_of_a_site_are_those_that_the_forward_has_taken(layer_case, dora_model, norms_taken):
    model, stock = ours_and_pefts(dora_model(layer_case))
    (site,), (plain,) = find_sites(model), find_sites(stock)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.1)
    for steps in (1, 2):
        outcome(model, to(torch.float64, layer_case.inputs()))
        assert gap(norms_of(site), dense_norms(model)) <= EXACT
        assert len(norms_taken) == steps
        optimizer.step()
    assert gap(norms_of(site), dense_norms(model)) <= EXACT
    assert gap(norms_of(plain), dense_norms(stock)) <= EXACT


def test_norms_of_a_dead_site_are_those_of_its_weight(layer_case, dora_model):
    model, stock = ours_and_pefts(dora_model(layer_case))
    for each in (model, stock):
        surgery.resize(find_sites(each), plan([], 0), None, orthogonal(seed()))
        (site,) = find_sites(each)
        assert gap(norms_of(site), dense_norms(each)) <= EXACT


def test_one_norm_serves_a_whole_evaluation(dora_llama, norms_taken):
    model, tokens = dora_llama
    accelerate_dora(model.eval())
    with torch.no_grad():
        for _ in range(3):
            model(tokens)
    assert len(norms_taken) == 14


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients_from_one_norm(reentrant, dora_llama, norms_taken):
    model, stock = ours_and_pefts(dora_llama[0])
    tokens = dora_llama[1]
    expected = outcome(stock, tokens)
    model.train()
    model.enable_input_require_grads()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": reentrant})
    calls = []
    handle = (
        find_sites(model)[0]
        .layer.get_base_layer()
        .register_forward_hook(lambda *_: calls.append(1))
    )
    assert agree(outcome(model, tokens), expected)
    handle.remove()
    assert len(calls) == 2  # it was computed again in backward
    assert len(norms_taken) == 14


def test_checkpointing_repeats_the_dropout(llama, adapt):
    base = adapt(llama(), target_modules="all-linear", use_dora=True, lora_dropout=0.3).double()
    accelerate_dora(base)
    tokens = torch.randint(13, (2, 7))
    base.train()
    base.enable_input_require_grads()
    torch.manual_seed(2)
    expected = outcome(base, tokens)
    base.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(2)
    assert agree(outcome(base, tokens), expected)


# Memory


class Watch(TorchDispatchMode):
    """Notes the operations and the tensors that they make."""

    def __init__(self):
        super().__init__()
        self.made = []
        self.calls = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        storages = {t.untyped_storage().data_ptr() for t in given}
        self.calls.append((operation, storages))
        for tensor in tree_leaves(result):
            is_tensor = isinstance(tensor, torch.Tensor)
            if is_tensor and tensor.untyped_storage().data_ptr() not in storages:
                self.made.append(tuple(tensor.shape))
        return result

    def largest(self):
        return max(np.prod(shape, dtype=int) for shape in self.made)

    def products_with(self, storage):
        """Matrix products that take the tensor of this storage."""
        products = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}
        return sum(op in products and storage in storages for op, storages in self.calls)


LARGE = {
    "linear": (lambda: nn.Linear(1024, 2048, bias=False), lambda: torch.randn(3, 1024)),
    "linear with bias": (lambda: nn.Linear(2048, 1024), lambda: torch.randn(2, 3, 2048)),
    "conv": (lambda: nn.Conv2d(512, 512, 3), lambda: torch.randn(2, 512, 3, 3)),
    "embedding": (lambda: nn.Embedding(4096, 512), lambda: torch.randint(4096, (2, 3))),
}


@pytest.fixture(params=LARGE.values(), ids=LARGE.keys())
def large(request, host, adapt, layer_cases):
    """A model around one large layer, an input, and the size of the layer's matrix."""
    make, inputs = request.param
    base = host(layer_cases["linear"])
    base.block["layer"] = make()
    model = adapt(base, use_dora=True, r=2)
    return model, inputs(), base.block["layer"].weight.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_as_large_as_the_matrix_is_made(dtype, large):
    model, x, size = large
    model, stock = ours_and_pefts(model.to(dtype))
    x = to(dtype, x)
    peaks = []
    for each in (model, stock):
        with Watch() as watch:
            out = each(x)
        with Watch() as back:
            out.sum().backward()
        peaks.append((watch.largest(), back.largest()))
        if each is model:
            (site,) = find_sites(model)
            square = {(n, n) for n in (site.in_features, site.out_features)}
            assert not square & {*watch.made, *back.made}
    # The gradient of an embedding's A is (rank, vocabulary); of any A (rank, in).
    assert peaks[0][0] <= size / 8
    assert peaks[0][1] <= size / 8
    assert peaks[1][0] >= size  # the watch sees PEFT's


def test_nothing_as_large_is_made_where_all_rows_cancel(host, adapt, layer_cases):
    base = host(layer_cases["linear"])
    base.block["layer"] = nn.Linear(1024, 2048)
    model = adapt(base, use_dora=True, r=2)
    (site,) = find_sites(model)
    weight = site.layer.get_base_layer().weight
    weight.data = (1e-3 * weight - site.scale * site.B @ site.A).detach()
    accelerate_dora(model)
    with Watch() as watch:
        model(torch.randn(3, 1024))
    assert watch.largest() <= weight.numel() / 8


def test_backward_keeps_the_input_an_output_and_the_branch(layer_cases, host, adapt):
    base = host(layer_cases["linear"])
    base.block["layer"] = nn.Linear(96, 80)
    model = adapt(base, use_dora=True, r=4)
    accelerate_dora(model)
    x = torch.randn(500, 96, requires_grad=True)
    held = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in held:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    vectors = 6 * 80
    assert sum(kept.values()) <= 500 * (96 + 80 + 4) + vectors


def saved_by(model, x):
    """What a forward keeps for backward."""
    kept = []

    def note(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(x)
    return kept


@pytest.mark.parametrize("kind", ["linear", "Conv1D of transformers"])
def test_an_input_in_low_precision_is_kept_without_a_copy(kind, layer_cases, host, adapt):
    model = adapt(host(layer_cases[kind]).bfloat16(), use_dora=True)
    model, stock = ours_and_pefts(model)
    x = layer_cases[kind].inputs().bfloat16().requires_grad_()
    place = x.untyped_storage().data_ptr()
    for each in (model, stock):
        kept = [tensor.untyped_storage().data_ptr() for tensor in saved_by(each, x)]
        assert (place in kept) == (each is model)


def test_a_layer_is_freed_with_its_last_reference(layer_case, dora_model):
    model = dora_model(layer_case)
    accelerate_dora(model)
    model(to(torch.float64, layer_case.inputs()))
    (site,) = find_sites(model)
    layer = weakref.ref(site.layer)
    gc.disable()
    try:
        del model, site
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("enabled", [False, True])
def test_pefts_switch_of_input_conversion_goes_on_working(enabled, layer_cases, host, adapt):
    model = adapt(host(layer_cases["linear"]).bfloat16(), use_dora=True)
    accelerate_dora(model)
    adapt(None, onto=model, adapter="later", r=2)
    model.base_model.set_adapter("later")
    x = layer_cases["linear"].inputs().bfloat16()
    model(x)
    with peft.helpers.disable_input_dtype_casting(model, active=not enabled):
        if enabled:
            model(x)
        else:
            with pytest.raises(RuntimeError, match="dtype"):
                model(x)
    model(x)


@pytest.mark.parametrize("neighbour", ["LoRA", "DoRA of PEFT"])
def test_an_input_is_converted_for_a_neighbour_that_needs_it(neighbour, layer_cases, host, adapt):
    model = adapt(host(layer_cases["linear"]).bfloat16(), use_dora=True)
    accelerate_dora(model)
    adapt(None, onto=model, adapter="later", r=2, use_dora=neighbour != "LoRA")
    x = layer_cases["linear"].inputs().bfloat16()
    for active in (["later"], ["later", "default"], ["default", "later"], ["default"]):
        model.base_model.set_adapter(active)
        assert model(x).dtype == torch.bfloat16


def test_the_magnitude_of_many_tokens_keeps_its_digits(layer_cases, host, adapt):
    model, stock = ours_and_pefts(adapt(host(layer_cases["linear"]), use_dora=True))
    x = torch.randn(20_000, 6)
    mine, exact = outcome(model, x), outcome(stock.double(), x.double())
    (name,) = [n for n in mine if "magnitude" in n]
    assert gap(mine[name], exact[name]) <= SINGLE


# Quantised bases


@pytest.fixture(params=["nf4", "int8"])
def quantised(request, host, adapt, layer_cases):
    """A DoRA model over a quantised layer, and PEFT's over the same weight dequantised."""
    bnb = pytest.importorskip("bitsandbytes")
    base = host(layer_cases["linear"])
    if request.param == "nf4":
        layer = bnb.nn.Linear4bit(128, 64, quant_type="nf4", compute_dtype=torch.float32)
        base.is_loaded_in_4bit = True
    else:
        layer = bnb.nn.Linear8bitLt(128, 64, has_fp16_weights=False)
        base.is_loaded_in_8bit = True
    base.block["layer"] = layer
    model = adapt(base.to("cpu"), use_dora=True)

    def reference():
        plain = host(layer_cases["linear"])
        plain.block["layer"] = linear = nn.Linear(128, 64)
        exact = adapt(plain, use_dora=True).double()
        weight = layer.weight
        if request.param == "nf4":
            dense = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        else:  # bitsandbytes moves the scales to the state at the first forward
            scales = layer.state.SCB if weight.SCB is None else weight.SCB
            dense = weight.data.double() * scales.double()[:, None] / 127
        linear.weight.data, linear.bias.data = dense.double(), layer.bias.detach().double()
        (mine,), (theirs,) = find_sites(model), find_sites(exact)
        for part in ("A", "B", "magnitude"):
            getattr(theirs, part).data = getattr(mine, part).detach().double()
        return exact

    return model, reference


def test_a_quantised_base_is_pefts_dora_of_the_dequantised_weight(quantised):
    model, reference = quantised
    assert accelerate_dora(model) == 1
    x = torch.randn(3, 5, 128)
    for _ in range(3):
        assert agree(outcome(model, x), outcome(reference(), x.double()), SINGLE)
        with torch.no_grad():
            find_sites(model)[0].B.add_(torch.randn(64, 3))


@pytest.mark.filterwarnings("ignore:(Merge|Unmerge) lora module to .-bit linear may get")
def test_the_norms_follow_a_quantised_weight_that_merging_rounded(quantised):
    model, reference = quantised
    accelerate_dora(model)
    x = torch.randn(5, 128)
    before = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    mine = outcome(model, x)
    assert gap(mine["output"], before) > 10 * SINGLE  # quantised anew
    assert agree(mine, outcome(reference(), x.double()), SINGLE)


# Compilation


# torch's own tracer makes an instance of autograd.Function, and torch warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "conv2d", "embedding"])
def test_the_forward_compiles_without_a_break(kind, dropout, layer_cases, dora_model):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not support this platform")
    torch._dynamo.reset()
    case = layer_cases[kind]
    model, stock = ours_and_pefts(dora_model(case, lora_dropout=dropout).train(dropout == 0))
    x = to(torch.float64, case.inputs())
    (site,) = find_sites(model)
    compiled = torch.compile(site.layer, fullgraph=True, backend="aot_eager")
    (plain,) = find_sites(stock)
    assert agree(outcome(compiled, x), _prefixed(outcome(plain.layer, x)))
    for each in (model, stock):
        optimizer = torch.optim.AdamW(trainable(each), lr=0.1)
        optimizer.step()
        with_tensor("B", write_in_place)(each)
    assert agree(outcome(compiled, x), _prefixed(outcome(plain.layer, x)))
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("kind", ["linear", "linear without bias"])
def test_a_change_of_rank_compiles_nothing_anew(kind, layer_cases, dora_model):
    if not torch._dynamo.is_dynamo_supported():
        pytest.skip("torch.compile does not support this platform")
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, stock = ours_and_pefts(dora_model(layer_cases[kind]))
    (site,), (plain,) = find_sites(model), find_sites(stock)
    compiled = torch.compile(site.layer, fullgraph=True, backend=counter)
    x = layer_cases[kind].inputs().double()
    dynamic = {
        "force_parameter_static_shapes": False,
        "force_nn_module_property_static_shapes": False,
    }
    with torch._dynamo.config.patch(dynamic):
        for rank in (4, 7, 2, 5):
            for each in (site, plain):
                generator = seed()
                A = torch.randn(rank, site.in_features, generator=generator).double()
                B = torch.randn(site.out_features, rank, generator=generator).double()
                each.install(nn.Parameter(A), nn.Parameter(B))
            torch._dynamo.mark_dynamic(site.A, 0)
            torch._dynamo.mark_dynamic(site.B, 1)
            assert agree(outcome(compiled, x), _prefixed(outcome(plain.layer, x)))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def _prefixed(result):
    return {n if n in ("output", "x") else f"_orig_mod.{n}": v for n, v in result.items()}


# End to end


MOVES = {"schedule": "linear", "warmup": 2, "cooldown": 4, "every": 2}
BUDGETS = {
    "starving": {"rank": 1.2, "start": 1.5, "recycle": 1.0, "score": "random", "protect": 0},
    "dying and returning": {"rank": 1.5, "start": 0.5, "policy": "uniform"},
}


@pytest.fixture(params=BUDGETS.values(), ids=BUDGETS.keys())
def budget(request):
    return BudgetSpec(**MOVES, **request.param)


def run_with_rankflow(model, budget, steps=24):
    """Train with an event at every second step and return the engine."""
    flow = RankFlow(model, budget, steps)
    optimizer = torch.optim.AdamW(trainable(model), lr=0.02)
    model.train()
    for step in range(steps):
        tokens = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(step))
        for half in tokens:
            model(half[None], labels=half[None]).loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    return flow


def test_a_run_with_events_is_the_run_on_pefts_dora(budget, llama, adapt):
    base = adapt(llama(), target_modules="all-linear", use_dora=True, trained=False).double()
    model, stock = ours_and_pefts(base)
    flow, plain = run_with_rankflow(model, budget), run_with_rankflow(stock, budget)
    assert flow.ranks == plain.ranks
    assert [e.ranks for e in flow.history] == [e.ranks for e in plain.history]
    mine, expected = model.state_dict(), stock.state_dict()
    assert mine.keys() == expected.keys()
    # Adam divides by the root of the second moment, which magnifies rounding near zero gradients.
    assert max(gap(mine[key], expected[key]) for key in expected) <= 1e-6


def test_an_accelerated_run_is_exported_as_a_stock_adapter(budget, llama, adapt, tmp_path):
    base = llama()
    weights = copy.deepcopy(base.state_dict())
    model = adapt(base, target_modules="all-linear", use_dora=True, trained=False)
    accelerate_dora(model)
    flow = run_with_rankflow(model, budget)
    seen = [[event.ranks[site] for event in flow.history] for site in flow.ranks]
    assert any(a > 0 == b for ranks in seen for a, b in itertools.pairwise(ranks))
    if budget.policy == "uniform":
        assert any(a == 0 < b for ranks in seen for a, b in itertools.pairwise(ranks))
    for site in find_sites(model):
        variant = site.layer.lora_variant["default"]
        alive = variant.revived if isinstance(variant, DeadVariant) else variant
        assert type(alive).__module__ == "rankflow.adapters.dora"

    folder = export_adapter(model, tmp_path / "adapter")
    clean = llama()
    clean.load_state_dict(weights)
    stock = peft.PeftModel.from_pretrained(clean, folder).eval()
    tokens = torch.randint(13, (2, 7))
    with torch.no_grad():
        assert gap(model.eval()(tokens).logits, stock(tokens).logits) <= 1e-5
        merged = stock.merge_and_unload()(tokens).logits
        assert gap(model(tokens).logits, merged) <= 1e-5


def test_a_stock_checkpoint_reads_back(llama, adapt, tmp_path):
    base = llama()
    weights = copy.deepcopy(base.state_dict())
    model = adapt(base, target_modules="all-linear", use_dora=True)
    accelerate_dora(model.eval())
    model.save_pretrained(tmp_path)
    clean = llama()
    clean.load_state_dict(weights)
    stock = peft.PeftModel.from_pretrained(clean, tmp_path).eval()
    tokens = torch.randint(13, (2, 7))
    assert gap(model(tokens).logits, stock(tokens).logits) <= 1e-5
