"""Several exported adapters on one base: switched, swapped, mixed in a batch, trained beside."""

from dataclasses import dataclass
from pathlib import Path

import peft
import pytest
import torch
import transformers
from peft.utils.hotswap import hotswap_adapter

from rankflow.adapters.dora import accelerate_dora
from rankflow.engine import RankFlow
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.specs.budget import load_budget

TOKENS = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(0))
STEPS = 16
# DoRA or not, and the budget's rank; so small that some sites die.
KINDS = {"dora-a": (True, 0.6), "dora-b": (True, 1.2), "lora-a": (False, 0.6), "lora-b": (False, 2)}


@dataclass(frozen=True)
class Adapter:
    folder: Path
    uniform: Path
    ranks: dict[str, int]
    logits: torch.Tensor


def make_base():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return transformers.LlamaForCausalLM(config)


def lora_config(use_dora):
    return peft.LoraConfig(r=4, lora_alpha=8, use_dora=use_dora, target_modules="all-linear")


def steer(model, name, rank):
    use_dora = model.peft_config[name].use_dora
    budget = load_budget("hybrid" if use_dora else "prune", rank=rank, start=2.0, every=2)
    flow = RankFlow(model, budget, total_steps=STEPS, adapter_name=name)
    trained = [p for p in model.parameters() if p.requires_grad]
    return flow, torch.optim.AdamW(trained, lr=0.02)


def take_step(model, flow, optimizer, seed):
    tokens = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(seed))
    model(input_ids=tokens, labels=tokens).loss.backward()
    flow.observe()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    flow.step(optimizer)


def train(model, name, *, rank, seed):
    flow, optimizer = steer(model, name, rank)
    for _ in range(STEPS):
        take_step(model, flow, optimizer, seed)
    flow.close()
    return flow


@torch.no_grad()
def run(model, **arguments):
    return model.eval()(input_ids=TOKENS, **arguments).logits


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Adapters of other ranks and other sites, with what stock PEFT computes from each alone."""
    made = {}
    for seed, (name, (use_dora, rank)) in enumerate(KINDS.items(), 1):
        model = peft.get_peft_model(make_base(), lora_config(use_dora))
        flow = train(model, "default", rank=rank, seed=seed)
        folder = tmp_path_factory.mktemp(name)
        exact = export_adapter(model, folder / "exact")
        uniform = folder / "uniform"
        if not use_dora:
            export_adapter(model, uniform, format="peft-uniform", options=ExportOptions(rank=8))
        alone = run(peft.PeftModel.from_pretrained(make_base(), exact))
        assert (alone - run(model)).abs().max() < 1e-5
        made[name] = Adapter(exact, uniform, flow.ranks, alone)
    return made


@pytest.fixture
def host(adapters):
    """A base with all of the adapters."""
    first, *others = adapters
    model = peft.PeftModel.from_pretrained(make_base(), adapters[first].folder, adapter_name=first)
    for name in others:
        model.load_adapter(adapters[name].folder, name)
    return model


def use(model, name):
    """Make an adapter the only one that works."""
    model.set_adapter(name)
    return run(model)


def test_the_adapters_have_dead_sites_and_differ(adapters):
    assert all(0 in adapter.ranks.values() for adapter in adapters.values())
    assert len({tuple(adapter.ranks.values()) for adapter in adapters.values()}) == len(adapters)
    logits = [adapter.logits for adapter in adapters.values()]
    assert min((a - b).abs().max() for a in logits for b in logits if a is not b) > 0.01


def test_each_adapter_computes_beside_the_others_bit_for_bit_as_alone(host, adapters):
    for name in [*adapters, *reversed(adapters)]:
        assert torch.equal(use(host, name), adapters[name].logits)


def test_all_of_them_can_be_switched_off(host):
    use(host, "dora-b")
    with host.disable_adapter():
        assert torch.equal(run(host), run(make_base()))


def test_the_fast_forward_of_one_adapter_leaves_the_others_alone(host, adapters):
    accelerate_dora(host, "dora-a")
    for name, adapter in adapters.items():
        difference = (use(host, name) - adapter.logits).abs().max()
        assert difference < 1e-6 if name == "dora-a" else difference == 0


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_training_one_adapter_leaves_the_others_as_they_were(host, adapters, use_dora):
    before = {name: p.clone() for name, p in host.named_parameters()}
    host.add_adapter("new", lora_config(use_dora))
    host.set_adapter("new")
    host.train()
    flow = train(host, "new", rank=1, seed=9)
    assert len(flow.history) > 0
    assert len(set(flow.ranks.values())) > 1
    after = dict(host.named_parameters())
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    for name, adapter in adapters.items():
        assert torch.equal(use(host, name), adapter.logits)


@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, False)], ids=str)
def test_two_that_train_in_turn_become_what_each_becomes_alone(kinds):
    def start(names):
        model = peft.get_peft_model(make_base(), lora_config(kinds[0]), adapter_name="0")
        model.add_adapter("1", lora_config(kinds[1]))
        runs = {}
        for name in names:
            model.set_adapter(name)
            runs[name] = steer(model, name, rank=1)
        return model, runs

    model, runs = start(("0", "1"))
    for _ in range(STEPS):
        for name in runs:
            model.set_adapter(name)
            take_step(model, *runs[name], seed=int(name))
    for name in runs:
        alone, run_alone = start((name,))
        for _ in range(STEPS):
            take_step(alone, *run_alone[name], seed=int(name))
        assert len(set(run_alone[name][0].ranks.values())) > 1
        assert runs[name][0].ranks == run_alone[name][0].ranks
        assert torch.equal(use(model, name), use(alone, name))


def test_an_adapter_is_replaced_by_loading_switching_and_deleting(host, adapters):
    use(host, "dora-a")
    host.load_adapter(adapters["dora-b"].folder, "dora-a2")
    assert torch.equal(use(host, "dora-a2"), adapters["dora-b"].logits)
    host.delete_adapter("dora-a")
    assert torch.equal(run(host), adapters["dora-b"].logits)
    assert torch.equal(use(host, "lora-a"), adapters["lora-a"].logits)
    assert not any("dora-a." in name for name, _ in host.named_parameters())


@pytest.mark.parametrize(("old", "new"), [("lora-a", "lora-b"), ("lora-b", "lora-a")])
def test_pefts_hot_swap_takes_uniform_exports_whatever_their_ranks(old, new, adapters):
    model = peft.PeftModel.from_pretrained(make_base(), adapters[old].uniform)
    hotswap_adapter(model, str(adapters[new].uniform), adapter_name="default", torch_device="cpu")
    assert (run(model) - adapters[new].logits).abs().max() < 1e-6


@pytest.mark.parametrize(("old", "new"), [("lora-a", "lora-b"), ("dora-a", "dora-b")])
def test_pefts_hot_swap_refuses_exports_of_other_ranks(old, new, adapters):
    model = peft.PeftModel.from_pretrained(make_base(), adapters[old].folder)
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, str(adapters[new].folder), adapter_name="default")
    assert torch.equal(run(model), adapters[old].logits)


def test_lora_adapters_mix_in_one_batch(adapters):
    model = peft.PeftModel.from_pretrained(
        make_base(), adapters["lora-a"].folder, adapter_name="lora-a"
    )
    model.load_adapter(adapters["lora-b"].folder, "lora-b")
    names = ["lora-a", "lora-b", "__base__", "lora-a"]
    alone = {name: adapter.logits for name, adapter in adapters.items()}
    alone["__base__"] = run(make_base())
    mixed = run(model, adapter_names=names)
    for row, name in enumerate(names):
        assert (mixed[row] - alone[name][row]).abs().max() < 1e-6


def test_peft_refuses_to_mix_a_dora_adapter_in_a_batch(host):
    with pytest.raises(ValueError, match="DoRA"):
        run(host, adapter_names=["dora-a", "lora-a", "lora-a", "dora-b"])
