"""RankFlow around a CUDA graph: forward, backward and clipping replayed, captured anew by events.

A replay runs what was recorded, at the addresses that it had. So the batch is copied into place,
gradients stay where they are, and an event, which puts other parameters in place, needs a new
capture. The optimizer's step stays outside: newborns' first steps are corrected one by one. Where
newborns point is not sketched either, since that needs Python in backward: `grow = "orthogonal"`.
Without a GPU the same loop runs without a graph.

    python examples/cuda_graphs.py
"""

import tempfile
from collections.abc import Callable

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from transformers import LlamaConfig, LlamaForCausalLM

import rankflow as rf

STEPS, WARM_UP = 60, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    return LlamaForCausalLM(config).to(DEVICE)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def capture(model: PeftModel, tokens: Tensor) -> Callable[[], Tensor]:
    """Return what computes the loss of `tokens`, and the clipped gradients, at every call."""

    def compute() -> Tensor:
        model.zero_grad(set_to_none=True)  # so that gradients are written, not added to
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        clip_grad_norm_(trained(model), 1.0)
        return loss.detach()

    if DEVICE == "cpu":
        return compute
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):  # whatever is made at first use is made now
            compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = compute()

    def replay() -> Tensor:
        graph.replay()
        return loss

    return replay


def main() -> None:
    config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
    model = get_peft_model(build_base(), config)
    budget = rf.load_budget("hybrid", rank=2, every=6, grow="orthogonal")
    flow = rf.RankFlow(model, budget, total_steps=STEPS)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-2)

    batches = (torch.arange(64).unsqueeze(1) + torch.arange(32)).to(DEVICE) % 64
    tokens = batches[:16].clone()
    compute, captures = capture(model, tokens), 1
    for step in range(1, STEPS + 1):
        tokens.copy_(batches[torch.randperm(64)[:16].to(DEVICE)])
        loss = compute()
        flow.observe()
        optimizer.step()
        event = flow.step(optimizer)
        if event is not None:
            del compute  # its memory goes before the next graph takes some
            compute, captures = capture(model, tokens), captures + 1
            print(
                f"step {step}  loss {loss.item():.3f}  spent {event.spent:,} of {event.limit:,}  "
                f"pruned {len(event.pruned)}, born {len(event.born)}"
            )
    print(f"{captures} captures for {STEPS} steps" if DEVICE == "cuda" else "no GPU, and no graph")

    with tempfile.TemporaryDirectory() as folder:
        adapter = rf.export_adapter(model, f"{folder}/adapter", facts=flow.facts())
        loaded = PeftModel.from_pretrained(build_base(), adapter).eval()
        with torch.no_grad():
            here = model.eval()(input_ids=tokens).logits
            there = loaded(input_ids=tokens).logits
    print(f"stock PEFT differs by at most {(here - there).abs().max():.1e}")


if __name__ == "__main__":
    main()
