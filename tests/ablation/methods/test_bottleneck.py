import re
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import T5Config, T5ForConditionalGeneration

from rankflow.ablation.methods.bottleneck import Bottleneck, BottleneckAdapters
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.training.models import BaseModel

METHOD = BottleneckAdapters()

# How the layers that write to the residual stream are called inside a block.
PLACES = {
    "BertForSequenceClassification": {"attention.output.dense", "output.dense"},
    "LlamaForCausalLM": {"self_attn.o_proj", "mlp.down_proj"},
    "GPT2LMHeadModel": {"attn.c_proj", "mlp.c_proj"},
    "BartForConditionalGeneration": {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"},
    "T5ForConditionalGeneration": {
        "layer.0.SelfAttention.o",
        "layer.1.EncDecAttention.o",
        "layer.1.DenseReluDense.wo",
        "layer.2.DenseReluDense.wo",
    },
}


def without_heads(model):
    return BaseModel(model, None, (), ())


def places(model):
    """Where the adapters are, by name inside the block."""
    names = [n.removesuffix(".adapter") for n, m in model.named_modules() if n.endswith(".adapter")]
    return {re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in names}


def randomise(model):
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Bottleneck):
                for parameter in module.parameters():
                    parameter.normal_(std=0.3)


def make_t5():
    config = T5Config(
        vocab_size=13, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return T5ForConditionalGeneration(config)


def test_a_bottleneck_adds_what_two_layers_make_of_its_input():
    module = Bottleneck(6, 2, torch.device("cpu")).double()
    randomise(module)
    hidden = torch.randn(3, 6, dtype=torch.float64)
    inner = hidden @ module.down.weight.T + module.down.bias
    inner = inner * (1 + torch.erf(inner / 2**0.5)) / 2
    expected = hidden + inner @ module.up.weight.T + module.up.bias
    torch.testing.assert_close(module(hidden), expected)


def test_it_starts_as_the_base(host_case, setting):
    batch = host_case.batch()
    expected = host_case.base().model.eval()(**batch).logits
    model = METHOD.build(host_case.base(), setting, 3).model.eval()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_each_block_has_two_and_they_are_counted_by_hand(host_case, setting, trained_names):
    base = host_case.base()
    assert METHOD.sizes(base, setting) == range(1, 16)
    before = {n: p.shape for n, p in base.model.named_parameters()}
    model = METHOD.build(base, setting, 5).model
    new = {n: p for n, p in model.named_parameters() if n not in before}
    hidden, size, blocks = 16, 5, 2
    assert sum(p.numel() for p in new.values()) == 2 * blocks * (2 * hidden * size + hidden + size)
    in_heads = {n for n in before if n.startswith(host_case.full_modules or ("none",))}
    assert trained_names(model) == set(new) | in_heads


def test_they_stand_where_a_block_writes_to_its_residual_stream(transformer, setting):
    model = transformer()
    METHOD.build(without_heads(model), setting, 3)
    assert places(model) == PLACES[type(model).__name__]


def test_they_stand_in_t5_as_well(setting):
    model = make_t5()
    METHOD.build(without_heads(model), setting, 3)
    assert places(model) == PLACES["T5ForConditionalGeneration"]


def test_what_reaches_the_residual_sum_has_passed_the_adapter(host_cases, setting):
    model = METHOD.build(host_cases["language model"].base(), setting, 3).model
    randomise(model)
    block = model.model.layers[0]
    x = torch.randn(2, 4, 16)
    written = block.mlp(x)
    plain = functional.linear(
        block.mlp.act_fn(block.mlp.gate_proj(x)) * block.mlp.up_proj(x), block.mlp.down_proj.weight
    )
    torch.testing.assert_close(written, block.mlp.down_proj.adapter(plain))
    assert (written - plain).abs().max() > 0.01


def test_they_learn_and_leave_the_base_alone(host_case, setting, train):
    model = METHOD.build(host_case.base(), setting, 4).model
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    losses = train(model, host_case.batch(), 2e-2)
    assert losses[-1] < losses[0] - 0.1
    for name, parameter in model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["token classifier", "language model"])
def test_gradients_are_the_same_under_checkpointing(name, host_cases, setting):
    case = host_cases[name]
    model = METHOD.build(case.base(), setting, 4).model.train()
    randomise(model)
    other = deepcopy(model)
    other.activation_checkpointing_enable({"use_reentrant": False})
    for each in (model, other):
        each(**case.batch()).loss.backward()
    for (key, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert (one.grad is not None) == one.requires_grad, key
        if one.requires_grad:
            torch.testing.assert_close(two.grad, one.grad)


def test_a_copy_has_adapters_of_its_own(host_case, setting):
    model = METHOD.build(host_case.base(), setting, 4).model.eval()
    randomise(model)
    batch = host_case.batch()
    expected = model(**batch).logits.detach()
    copied = deepcopy(model)
    randomise(model)
    torch.testing.assert_close(copied(**batch).logits, expected, rtol=0, atol=0)
    assert (model(**batch).logits - expected).abs().max() > 1e-4


def test_a_state_dict_brings_them_back(host_case, setting):
    model = METHOD.build(host_case.base(), setting, 4).model.eval()
    randomise(model)
    other = METHOD.build(host_case.base(), setting, 4).model.eval()
    other.load_state_dict(model.state_dict())
    batch = host_case.batch()
    torch.testing.assert_close(other(**batch).logits, model(**batch).logits, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_trains_under_autocast_with_adapters_in_float32(dtype, host_case, setting, train):
    model = METHOD.build(host_case.base(dtype), setting, 4).model
    adapters = [m for m in model.modules() if isinstance(m, Bottleneck)]
    losses = train(model, host_case.batch(), 2e-2, autocast=True)
    assert losses[-1] < losses[0] - 0.05
    assert {p.dtype for adapter in adapters for p in adapter.parameters()} == {torch.float32}


def test_a_narrow_base_keeps_its_type_without_autocast(host_cases, setting):
    case = host_cases["language model"]
    model = METHOD.build(case.base(torch.bfloat16), setting, 4).model
    randomise(model)
    assert model(**case.batch()).logits.dtype == torch.bfloat16


def test_nothing_can_be_merged(host_case, setting):
    assert METHOD.build(host_case.base(), setting, 1).merge is None


def test_it_can_be_counted_without_numbers(host_case, setting, trained_names):
    with torch.device("meta"):
        base = host_case.base()
    model = METHOD.build(base, setting, 3).model
    assert {p.device.type for p in model.parameters()} == {"meta"}
    real = METHOD.build(host_case.base(), setting, 3).model
    assert trained_names(model) == trained_names(real)


class Blocks(nn.Module):
    """Blocks of linear layers with the given names."""

    def __init__(self, *names, kind=nn.Linear):
        super().__init__()
        self.layers = nn.ModuleList([nn.Module()])
        for name in names:
            parent = self.layers[0]
            *path, last = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, kind(4, 4))


@pytest.mark.parametrize(
    ("names", "lacking"),
    [
        (("attn.q", "attn.out", "mlp.fc2"), "attention"),
        (("attn.o_proj", "mlp.w1", "mlp.w3"), "feed-forward"),
        # One expert of many is not the feed-forward layer.
        (("attn.o_proj", "mlp.shared_expert.down_proj"), "feed-forward"),
    ],
)
def test_a_block_that_lacks_a_place_is_refused_by_name(names, lacking, setting):
    base = without_heads(Blocks(*names))
    message = f"output projection of {lacking}, .* block 'layers.0' .*: {', '.join(names)}"
    with pytest.raises(UnsupportedError, match=message):
        METHOD.sizes(base, setting)


def test_a_model_without_blocks_is_refused(setting):
    with pytest.raises(UnsupportedError, match="Linear has none"):
        METHOD.sizes(without_heads(nn.Linear(3, 3)), setting)


def test_a_projection_that_torch_never_calls_does_not_count(setting):
    bypassed = nn.modules.linear.NonDynamicallyQuantizableLinear
    blocks = Blocks("attn.out_proj", kind=bypassed)
    blocks.layers[0].fc2 = nn.Linear(4, 4)
    with pytest.raises(UnsupportedError, match="output projection of attention"):
        METHOD.sizes(without_heads(blocks), setting)
