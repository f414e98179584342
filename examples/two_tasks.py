"""One base model, two tasks: adapters side by side, switched per request, and one replaced.

A small Llama with random weights learns to count up with a DoRA adapter and to count down with a
LoRA adapter, each under a budget of its own, so that their ranks and their sites differ. A server
holds the base once, and answers each request by the adapter of its task. Then a better adapter
for one task comes in, without a moment in which the task has none, and both share a batch.

    python examples/two_tasks.py
"""

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow as rf

NUMBERS = 16
STEP_OF = {"up": 1, "down": -1}


def build_base() -> LlamaForCausalLM:
    """Return the same random model at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=NUMBERS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(task: str, folder: Path, *, use_dora: bool, steps: int) -> None:
    """Train an adapter for a task, and export it."""
    config = LoraConfig(r=8, lora_alpha=16, use_dora=use_dora, target_modules="all-linear")
    model = get_peft_model(build_base(), config)
    budget = rf.load_budget("hybrid" if use_dora else "prune", rank=2)
    flow = rf.RankFlow(model, budget, total_steps=steps)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    start = torch.arange(NUMBERS).unsqueeze(1)
    tokens = (start + STEP_OF[task] * torch.arange(12)) % NUMBERS
    for _ in range(steps):
        model(input_ids=tokens, labels=tokens).loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    rf.export_adapter(model, folder, facts=flow.facts())
    print(f"{folder.name}: ranks {list(flow.ranks.values())}, {flow.spent:,} parameters")


def answer(model: PeftModel, adapter: str, number: int) -> list[int]:
    """Return the five numbers that follow, by the adapter of that name."""
    model.set_adapter(adapter)
    prompt = torch.tensor([[number, (number + STEP_OF[adapter.split("-")[0]]) % NUMBERS]])
    output = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False
    )
    return output[0, 2:].tolist()


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train("up", folder / "up", use_dora=True, steps=80)
        train("down", folder / "down", use_dora=False, steps=10)
        train("down", folder / "down-2", use_dora=False, steps=80)

        server = PeftModel.from_pretrained(build_base(), folder / "up", adapter_name="up").eval()
        server.load_adapter(folder / "down", "down")
        for adapter, number in [("up", 3), ("down", 3), ("up", 9), ("down", 9)]:
            print(f"{adapter} from {number}: {answer(server, adapter, number)}")

        # Hot swap: the new one is loaded beside the old one, requests move over, the old one goes.
        server.load_adapter(folder / "down-2", "down-2")
        for adapter, number in [("down-2", 3), ("up", 3), ("down-2", 9)]:
            print(f"{adapter} from {number}: {answer(server, adapter, number)}")
        # Rows of one batch may go to different adapters of LoRA; PEFT refuses DoRA's here.
        prompts = torch.tensor([[9, 8], [9, 8]])
        mixed = server.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=5,
            do_sample=False,
            adapter_names=["down", "down-2"],
        )
        print(f"both in one batch, from 9: {mixed[:, 2:].tolist()}")
        server.delete_adapter("down")
        print(f"adapters now: {', '.join(server.peft_config)}")


if __name__ == "__main__":
    main()
