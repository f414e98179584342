"""QDoRA end to end: a base in 4-bit NormalFloat trains, prunes, grows, exports and loads."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import rankflow as rf
from rankflow.adapters.base_weight import base_rows, dense_weight, row_norms
from rankflow.adapters.sites import find_sites

bitsandbytes = pytest.importorskip("bitsandbytes")

SHAPE = LlamaConfig(
    vocab_size=100,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
TOKENS = torch.randint(0, 100, (4, 16), generator=torch.Generator().manual_seed(1))
STEPS = 30


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Load the same base from disk, quantised, as often as wanted."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    LlamaForCausalLM(SHAPE).save_pretrained(folder)
    # Training mode: in evaluation mode bitsandbytes computes with other roundings on some CPUs.
    return lambda: LlamaForCausalLM.from_pretrained(
        folder, quantization_config=NF4, device_map="cpu"
    ).train()


def train(base, magnitude):
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    model = get_peft_model(base, config).train()
    budget = rf.load_budget("reallocate", rank=2, magnitude=magnitude, every=5, recycle=0.3)
    flow = rf.RankFlow(model, budget, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        assert flow.spent <= flow.limit
        losses.append(loss.item())
    return model, flow, losses


@pytest.mark.parametrize("magnitude", ["always", "budgeted", "never"])
def test_a_4_bit_base_trains_prunes_grows_and_exports(magnitude, load, tmp_path):
    model, flow, losses = train(load(), magnitude)
    assert isinstance(find_sites(model)[0].layer.get_base_layer(), bitsandbytes.nn.Linear4bit)
    assert losses[-1] < losses[0] - 0.2
    assert any(event.pruned for event in flow.history)
    assert any(event.born for event in flow.history)
    assert len(set(flow.ranks.values())) > 1
    rf.export_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").train()
    with torch.no_grad():
        ours, theirs = (m(input_ids=TOKENS).logits for m in (model, loaded))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def effective(model):
    """Each site's weight as it is in the codes, and as the adapter makes it."""
    pairs = []
    for site in find_sites(model):
        W = base_rows(site.layer).double()
        V = W + site.scale * (site.B.double() @ site.A.double()).detach()
        if site.magnitude is not None:
            V = site.magnitude.detach().double().view(-1, 1) * V / V.norm(dim=1, keepdim=True)
        pairs.append((W, V))
    return pairs


@pytest.mark.parametrize("magnitude", ["always", "never"])
def test_an_adapter_over_a_4_bit_base_is_compressed_by_the_weights_that_it_trained_on(
    magnitude, load, tmp_path
):
    config = LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules="all-linear")
    model = get_peft_model(load(), config).train()
    for name, parameter in model.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    before, half = effective(model), sum(site.parameters for site in find_sites(model)) // 2
    budget = rf.load_budget("reallocate", params=half, magnitude=magnitude)
    result = rf.compress(model, budget)
    after = effective(model)
    missing = sum((V - now).square().sum() for (_, V), (_, now) in zip(before, after, strict=True))
    change = sum((V - W).square().sum() for W, V in before)
    assert result.error == pytest.approx(float((missing / change).sqrt()), rel=1e-4)
    assert 0 < result.error < 1
    assert result.parameters <= half
    rf.export_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(load(), tmp_path / "adapter").train()
    with torch.no_grad():
        ours, theirs = (m(input_ids=TOKENS).logits for m in (model, loaded))
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)


def test_norms_survive_the_reordering_of_a_4_bit_weight_in_evaluation_mode(load):
    layer = find_sites(get_peft_model(load(), LoraConfig(r=2, use_dora=True)))[0].layer
    before = dense_weight(layer).clone()
    norms = row_norms(layer)
    layer.eval()
    with torch.no_grad():
        layer(torch.randn(2, 64))
        # What reordering costs is a rounding of the blocks' scales to bfloat16.
        torch.testing.assert_close(dense_weight(layer), before, rtol=2**-8, atol=1e-6)
        torch.testing.assert_close(row_norms(layer), norms, rtol=2**-8, atol=0)
        layer(torch.randn(2, 64))  # and the layer computes on
