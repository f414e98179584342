"""What it costs to ask the gradient where newborns should point.

In the steps before an event the gradient of every effective weight is sketched. Two equal trainees
take steps in turns, one with its sketch open and one without, so that a busy machine slows both
alike; the table gives medians. Random weights in two shapes: Llama's (hidden 1024, 2 layers, all 7
linear layers, 512 tokens) and MiniLM's (hidden 384, 6 layers, 32 x 32 tokens).

    python examples/benchmarks/growth.py
"""

import statistics
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from rankflow import RankFlow, accelerate_dora, load_budget

ROUNDS = 7
STEPS = 1000  # of the run over which the cost is averaged, at the default cadence
RANK = 8


def llama() -> nn.Module:
    """Return a small Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=2,
            num_attention_heads=16,
            num_key_value_heads=16,
        )
    )


def minilm() -> nn.Module:
    """Return a BERT of MiniLM's shape."""
    return BertForMaskedLM(
        BertConfig(
            vocab_size=1000,
            hidden_size=384,
            intermediate_size=1536,
            num_hidden_layers=6,
            num_attention_heads=12,
        )
    )


SHAPES = {"Llama": (llama, (1, 512)), "MiniLM": (minilm, (32, 32))}
CASES = [
    ("Llama", torch.float32, False, False),
    ("Llama", torch.float32, True, False),
    ("Llama", torch.bfloat16, False, False),
    ("Llama", torch.bfloat16, False, True),
    ("MiniLM", torch.float32, False, False),
    ("MiniLM", torch.float32, True, False),
]


class Trainee:
    """One adapter under a budget, what its steps took, and what they kept."""

    def __init__(self, shape: str, dtype: torch.dtype, dora: bool, checkpointing: bool, grow: str):
        torch.manual_seed(0)
        build, size = SHAPES[shape]
        base = build().to(dtype)
        if checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        config = LoraConfig(r=RANK, use_dora=dora, target_modules="all-linear")
        self.model: PeftModel = get_peft_model(base, config).train()
        if dora:
            accelerate_dora(self.model)
        # The event never comes, and is always near.
        timing = {"warmup": 10**6, "every": 10**6, "cooldown": 0, "grow_steps": 10**6}
        budget = load_budget("reallocate", rank=RANK, grow=grow, **timing)
        self.flow = RankFlow(self.model, budget, total_steps=2 * 10**6)
        self.tokens = torch.randint(0, 1000, size)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take one step and note its time."""
        began = time.perf_counter()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.flow.observe()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.flow.step(self.optimizer)
        self.seconds.append(time.perf_counter() - began)

    def kept(self) -> float:
        """Megabytes that the forward pass keeps for backward, the weights left out."""
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
            total = sum(kept.values())
        del loss
        return total / 1e6

    @property
    def buffers(self) -> float:
        """Megabytes that the sketch itself holds, twice the sums of its state."""
        state = self.flow.state_dict()["sketch"].values()
        return 2 * sum(t.numel() * t.element_size() for t in state) / 1e6

    @property
    def median(self) -> float:
        """Median seconds of a step, without the first two."""
        return statistics.median(self.seconds[2:])


def share_of_steps() -> float:
    """Share of a run's steps that are sketched at the default cadence."""
    budget = load_budget("reallocate", rank=RANK)
    model = get_peft_model(minilm(), LoraConfig(r=RANK, target_modules=["query"]))
    events = RankFlow(model, budget, total_steps=STEPS).resolved.scheduler.event_steps()
    steps = {s for e in events[:-1] for s in range(e - budget.grow_steps, e)}  # none at the last
    return len(steps) / STEPS


def main() -> None:
    share = share_of_steps()
    table = Table(
        "model", "type", "adapter", "without (ms)", "with (ms)", "in the window", "over a run",
        "kept for backward (MB)", "sketch (MB)", "adapter + Adam (MB)",
        title=f"of {STEPS} steps {share:.1%} are sketched",
    )  # fmt: skip
    for shape, dtype, dora, checkpointing in CASES:
        plain, asking = (
            Trainee(shape, dtype, dora, checkpointing, grow) for grow in ("orthogonal", "gradient")
        )
        for _ in range(ROUNDS):
            plain.step()
            asking.step()
        ratio = asking.median / plain.median
        trained = sum(
            p.numel() * p.element_size() for p in plain.model.parameters() if p.requires_grad
        )
        table.add_row(
            shape + (", checkpointing" if checkpointing else ""),
            str(dtype).removeprefix("torch."),
            "DoRA" if dora else "LoRA",
            f"{plain.median * 1e3:.0f}",
            f"{asking.median * 1e3:.0f}",
            f"{ratio:.3f}x",
            f"{1 + share * (ratio - 1):.4f}x",
            f"{plain.kept():.0f} -> {asking.kept():.0f}",
            f"{asking.buffers:.1f}",
            f"{4 * trained / 1e6:.1f}",
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
