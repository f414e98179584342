"""Draw what each method makes of the planted teacher: ranks, and dots for trained magnitudes.

Twelve layers learn true weights diag(g) (W + D). Two need other row norms g only, two an update D
of rank 4 or 7, one both, seven nothing (first column). What is left of the excess loss over ten
seeds, learning rates tuned, is in examples/ablations/RESULTS.md; this is one of them.

    python examples/hybrid_picture.py hybrid.png
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from rankflow import RankFlow, load_budget
from rankflow.ablation.planted import PlantedModel, PlantedRows, excess_share, plant
from rankflow.report.heatmap import rank_heatmap

PROBLEM = plant(seed=0)
NAMES, TRUE_RANKS = PROBLEM.design.names, PROBLEM.design.true_ranks
RANK, STEPS, BATCH = 2, 400, 64
METHODS = {  # whether DoRA, budget preset, learning rate, overrides of the budget
    "uniform LoRA": (False, "fixed", 2e-2, {}),
    "uniform DoRA": (True, "fixed", 4e-2, {}),
    "dynamic LoRA": (False, "hybrid", 2e-2, {"magnitude": "always"}),
    "hybrid": (True, "hybrid", 8e-2, {}),
}


def train(use_dora: bool, preset: str, rate: float, overrides: dict) -> tuple[float, RankFlow]:
    """Return the share of the excess loss that is left, and the engine."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=4, use_dora=use_dora, target_modules=list(NAMES))
    model = get_peft_model(PlantedModel(PROBLEM), config)
    flow = RankFlow(model, load_budget(preset, rank=RANK, **overrides), total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for batch in DataLoader(PlantedRows(PROBLEM, range(STEPS * BATCH)), BATCH):
        model(**batch).loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        flow.step(optimizer)
    return excess_share(model), flow


def main(path: str) -> None:
    """Train every method once, and draw the layers as rows and the methods as columns."""
    ranks = {f"{name}.needed": TRUE_RANKS[name] for name in NAMES}
    magnitudes = {f"{name}.needed": name in PROBLEM.design.true_magnitudes for name in NAMES}
    for method, (use_dora, *settings) in METHODS.items():
        left, flow = train(use_dora, *settings)
        print(f"{method}: {left:.1%} of the excess loss left")
        for name in NAMES:
            ranks[f"{name}.{method}"] = flow.ranks[name]
            magnitudes[f"{name}.{method}"] = flow.magnitudes.get(name, use_dora)
    title = "Rank of twelve layers at one budget"
    rank_heatmap(ranks, title=title, magnitudes=magnitudes).savefig(path, dpi=110)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "hybrid.png")
