import math

import pytest
import torch

from rankflow import RankFlow, load_budget
from rankflow.adapters.sites import find_sites
from rankflow.bench.shapes import TINY, Decoder, quantise
from rankflow.bench.trainee import (
    EVERY,
    PRESETS,
    SKETCHED,
    Adapter,
    Workload,
    draw_states,
    pace,
    start,
)

CPU = torch.device("cpu")
WORKLOAD = Workload(TINY, 2, 16, torch.float32)


def test_all_adapters_start_from_the_function_without_adapter():
    x = draw_states(WORKLOAD, CPU)
    with torch.no_grad():
        losses = [start(WORKLOAD, a, 4, CPU, 40).model.eval()(x).item() for a in Adapter]
    # AdaLoRA adds the orthogonality of its factors to the loss of a model that has one.
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.mark.parametrize("adapter", [a for a in Adapter if a is not Adapter.NONE])
def test_adapters_learn(adapter):
    trainee = start(WORKLOAD, adapter, 4, CPU, 40)
    x = draw_states(WORKLOAD, CPU)
    before = trainee.model(x).item()
    for _ in range(2 * EVERY):
        trainee.train()
    if adapter is Adapter.PEFT_ADALORA:  # its factors start at 0.02, which hides so few steps
        singular_values = [p for n, p in trainee.model.named_parameters() if "lora_E" in n]
        assert max(p.abs().max() for p in singular_values) > 1e-3
    else:
        assert trainee.model(x).item() < before


@pytest.mark.parametrize("adapter", list(Adapter))
def test_a_step_has_parts(adapter):
    trainee = start(WORKLOAD, adapter, 4, CPU, 40)
    steps = [trainee.step() for _ in range(2 * EVERY)]
    kinds = ["plain"] * (EVERY - SKETCHED) + ["sketched"] * (SKETCHED - 1) + ["event"]
    assert [step.kind for step in steps] == 2 * kinds
    assert all(step.total > step.importance + step.event > 0 for step in steps)


@pytest.mark.parametrize("adapter", PRESETS)
def test_events_come_where_steps_are_called_so(adapter):
    trainee = start(WORKLOAD, adapter, 4, CPU, 40)
    kinds = [trainee.step().kind for _ in range(3 * EVERY)]
    events = [step for step, kind in enumerate(kinds, start=1) if kind == "event"]
    assert [event.step for event in trainee.flow.history] == events
    assert trainee.flow.spent <= trainee.flow.limit


def test_only_the_accelerated_adapter_leaves_pefts_arithmetic():
    variants = {
        a: {type(s.layer.lora_variant.get("default")).__module__ for s in _sites(a)}
        for a in (Adapter.PEFT_DORA, Adapter.DORA, Adapter.HYBRID)
    }
    assert variants.pop(Adapter.PEFT_DORA) == {"peft.tuners.lora.variants"}
    assert all(modules == {"rankflow.adapters.dora"} for modules in variants.values())


def _sites(adapter):
    return find_sites(start(WORKLOAD, adapter, 4, CPU, 40).model)


def test_the_peak_grows_with_the_tokens_and_holds_the_weights():
    peaks = [
        start(Workload(TINY, 2, tokens, torch.float32), Adapter.HYBRID, 4, CPU, 40).peak()
        for tokens in (16, 64)
    ]
    model = start(WORKLOAD, Adapter.HYBRID, 4, CPU, 40).model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    assert weights < peaks[0] < peaks[1]


@pytest.mark.parametrize("adapter", PRESETS)
def test_the_pace_is_that_of_a_run_of_the_preset(adapter):
    model = start(WORKLOAD, Adapter.PEFT_DORA, 4, CPU, 40).model
    budget = load_budget(PRESETS[adapter], rank=4)
    flow = RankFlow(model, budget, 1000)
    events = flow.resolved.scheduler.event_steps()
    shares = len(events) / 1000, (len(events) - 1) * budget.grow_steps / 1000
    assert pace(adapter, 1000) == pytest.approx(shares)


def test_a_decoder_is_one_of_its_shape():
    decoder = Decoder(TINY, 1, CPU, torch.bfloat16)
    layer = decoder.model.layers[0]
    assert layer.self_attn.k_proj.weight.shape == (16, 32)
    assert layer.mlp.down_proj.weight.shape == (32, 48)
    assert {p.dtype for p in decoder.parameters()} == {torch.bfloat16}
    assert math.isfinite(decoder(torch.randn(1, 5, 32, dtype=torch.bfloat16)).item())


def test_a_decoder_in_four_bits_computes_nearly_the_same():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    decoder = Decoder(TINY, 1, CPU, torch.float32)
    x = torch.randn(1, 5, 32)
    with torch.no_grad():
        before = decoder.model(inputs_embeds=x).last_hidden_state
        after = quantise(decoder).model(inputs_embeds=x).last_hidden_state
    assert 0 < (after - before).norm() < 0.2 * before.norm()
    assert type(decoder.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize("adapter", list(Adapter))
def test_a_base_in_four_bits_is_trained_by_all_adapters(adapter):
    pytest.importorskip("bitsandbytes")
    trainee = start(Workload(TINY, 1, 8, torch.bfloat16, nf4=True), adapter, 4, CPU, 40)
    assert [trainee.step().kind for _ in range(EVERY)][-1] == "event"
    layers = [m for m in trainee.model.modules() if type(m).__name__ == "Linear4bit"]
    assert len(layers) >= 7
