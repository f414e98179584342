"""A training step with DoRA: RankFlow's forward against PEFT's DoRA and PEFT's LoRA.

Random weights in two shapes: Llama's (hidden 1024, 4 layers, all 7 linear layers, 512 tokens) and
MiniLM's (hidden 384, 6 layers, 32 x 32 tokens). The three adapters of a row train in turns, step by
step, so that a busy machine slows all of them alike; the table gives medians and ratios.

    python examples/benchmarks/dora_step.py
"""

import statistics
import time

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM

from rankflow import accelerate_dora

ROUNDS = 7


def llama() -> nn.Module:
    """Return a small Llama."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=1024,
            intermediate_size=2816,
            num_hidden_layers=4,
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
    ("Llama", 32, torch.float32, {}),
    ("Llama", 8, torch.float32, {}),
    ("Llama", 32, torch.bfloat16, {}),
    ("Llama", 32, torch.float32, {"dropout": 0.05}),
    ("Llama", 32, torch.bfloat16, {"checkpointing": True}),
    ("MiniLM", 32, torch.float32, {}),
    ("MiniLM", 8, torch.float32, {}),
]


class Trainee:
    """One adapter on one model, and how long its steps took."""

    def __init__(self, shape: str, rank: int, dtype: torch.dtype, dora: bool, fast: bool, **extra):
        torch.manual_seed(0)
        build, size = SHAPES[shape]
        base = build().to(dtype)
        if extra.get("checkpointing"):
            base.gradient_checkpointing_enable({"use_reentrant": False})
        config = LoraConfig(
            r=rank,
            lora_alpha=rank,
            use_dora=dora,
            lora_dropout=extra.get("dropout", 0.0),
            target_modules="all-linear",
        )
        self.model: PeftModel = get_peft_model(base, config).train()
        if extra.get("checkpointing"):
            self.model.enable_input_require_grads()
        if fast:
            accelerate_dora(self.model)
        self.tokens = torch.randint(0, 1000, size)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad])
        self.seconds: list[float] = []

    def step(self) -> None:
        """Take one step and note its time."""
        began = time.perf_counter()
        self.model(input_ids=self.tokens, labels=self.tokens).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.seconds.append(time.perf_counter() - began)

    @property
    def median(self) -> float:
        """Median seconds of a step, without the first two."""
        return statistics.median(self.seconds[2:])


def main() -> None:
    headings = ("model", "r", "type", "LoRA (ms)", "DoRA (ms)", "ours (ms)", "of LoRA", "of DoRA")
    table = Table(*headings)
    for shape, rank, dtype, extra in CASES:
        lora = Trainee(shape, rank, dtype, dora=False, fast=False, **extra)
        dora = Trainee(shape, rank, dtype, dora=True, fast=False, **extra)
        ours = Trainee(shape, rank, dtype, dora=True, fast=True, **extra)
        for _ in range(ROUNDS):
            for trainee in (lora, dora, ours):
                trainee.step()
        table.add_row(
            " ".join([shape, *extra]),
            str(rank),
            str(dtype).removeprefix("torch."),
            *(f"{t.median * 1e3:.0f}" for t in (lora, dora, ours)),
            f"{ours.median / lora.median:.2f}x",
            f"{ours.median / dora.median:.2f}x",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
