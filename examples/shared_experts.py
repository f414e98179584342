"""A mixture-of-experts model of transformers: attention and shared experts are adapted.

A small Qwen2-MoE with random weights learns to count. transformers keeps the routed experts of a
layer in one stacked tensor, and the router is a bare tensor too; neither is a layer, so that no
adapter on layers reaches them. RankFlow names the stacked ones in a warning, and moves a budget
between the rest, the gate of the shared expert, of rank 1 at most, included.

    python examples/shared_experts.py
"""

import tempfile
import warnings

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

import rankflow as rf

NUMBERS, STEPS = 16, 80


def build_base() -> Qwen2MoeForCausalLM:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=NUMBERS,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen2MoeForCausalLM(config)


def main() -> None:
    # For some architectures (Mixtral is one) PEFT puts the experts under "all-linear" as
    # target_parameters. Those cannot be resized: name the linear layers there instead.
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
    model = get_peft_model(build_base(), config)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        flow = rf.RankFlow(model, rf.load_budget("hybrid", rank=2), total_steps=STEPS)
    print(said[0].message)

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    tokens = (torch.arange(NUMBERS).unsqueeze(1) + torch.arange(12)) % NUMBERS
    for step in range(1, STEPS + 1):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        if step % 20 == 0:
            print(f"step {step}  loss {loss.item():.3f}")
    print(f"{flow.spent:,} of {flow.limit:,} parameters")
    for site, rank in flow.ranks.items():
        print(f"  {site:45} {rank}")

    with tempfile.TemporaryDirectory() as folder:
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
    with torch.no_grad():
        here, there = (m.eval()(input_ids=tokens).logits for m in (model, loaded))
    right = there[:, 1:-1].argmax(-1) == tokens[:, 2:]
    print(f"{right.float().mean():.0%} of the numbers come out right")
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
