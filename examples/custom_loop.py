"""RankFlow in a training loop of your own: three lines more than without it.

A small Llama with random weights learns to count; its DoRA adapter keeps a constant budget and
moves it between layers. The result is a stock PEFT adapter.

    python examples/custom_loop.py
"""

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow as rf

STEPS = 60


def build_base() -> LlamaForCausalLM:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
    model = get_peft_model(build_base(), config)
    budget = rf.load_budget("reallocate", rank=2, every=5)
    flow = rf.RankFlow(model, budget, total_steps=STEPS)  # 1: attach

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = torch.arange(16).unsqueeze(1)
    tokens = (first + torch.arange(32)) % 64
    for step in range(1, STEPS + 1):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        flow.observe()  # 2: gradients are complete
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        event = flow.step(optimizer)  # 3: maybe reallocate
        if event is not None:
            print(
                f"step {step}  loss {loss.item():.3f}  spent {event.spent:,} of {event.limit:,}  "
                f"pruned {len(event.pruned)}, born {len(event.born)}"
            )

    with tempfile.TemporaryDirectory() as folder:
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
        with torch.no_grad():
            here = model.eval()(input_ids=tokens).logits
            there = loaded(input_ids=tokens).logits
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
