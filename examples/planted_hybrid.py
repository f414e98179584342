"""Ranks that move, magnitudes, or both? A problem that needs both, and has budget for no more.

Twelve parallel linear layers. The true weights of layer i are diag(g_i) (W_i + D_i): two layers
have other row scales g, two an update D (ranks 4 and 7), one both (rank 5), seven neither. The
budget is rank 2, in parameters. All magnitudes cost a quarter of it, and the rest is just enough
for the 16 components of the three updates. Each part alone must fail:
- uniform LoRA has rank 2 where 4 to 7 are needed, and spends seven twelfths of its budget in vain;
- uniform DoRA fits g by its magnitudes, and has rank 1 to 2 where 4 to 7 are needed;
- dynamic LoRA finds the updates, but diag(g - 1) W has full rank, of which it can pay a little;
- hybrid, dynamic ranks beside magnitudes, can have all it needs.

    python examples/planted_hybrid.py          # what is left of the excess loss; about a minute
    python examples/planted_hybrid.py --tune   # how the learning rates were found, on other seeds
"""

import sys
from statistics import mean, stdev

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rankflow import RankFlow, load_budget

SHAPES = [(32, 48), (48, 32), (64, 40), (24, 64), (40, 40), (56, 24)]
SHAPES += [(32, 32), (48, 56), (64, 24), (40, 64), (24, 40), (56, 48)]
NAMES = [f"layers.{i}" for i in range(len(SHAPES))]
TRUE_RANKS = {2: 4, 7: 5, 4: 7}  # layer -> rank of its true update, of singular values 1
RESCALED = (0, 7, 9)  # by row scales with a mean of 1 and a deviation of 0.4
NOISE = 0.1
RANK, STEPS, BATCH = 2, 400, 64
SEEDS, TUNING_SEEDS, RATES = range(5), range(100, 103), (1e-2, 2e-2, 4e-2, 8e-2, 16e-2)
TRUTH = {"policy": "frozen", "ranks": {name: TRUE_RANKS.get(i, 0) for i, name in enumerate(NAMES)}}
METHODS = {  # whether DoRA, budget preset, tuned learning rate, overrides of the budget
    "true ranks": (True, "fixed", 8e-2, TRUTH),
    "uniform LoRA": (False, "fixed", 2e-2, {}),
    "uniform DoRA": (True, "fixed", 4e-2, {}),
    "dynamic LoRA": (False, "reallocate", 2e-2, {}),
    "hybrid": (True, "hybrid", 8e-2, {}),
}


class Planted(nn.Module):
    """The layers, their true weights, and a stream of data."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in SHAPES)
        self.truths = []
        for i, (n, m) in enumerate(SHAPES):
            self.layers[i].weight.data = weight = self._normal(m, n) / n**0.5
            left, right = (torch.linalg.qr(self._normal(k, TRUE_RANKS.get(i, 0))).Q for k in (m, n))
            scales = 1 + 0.4 * (i in RESCALED) * self._normal(m, 1)
            self.truths.append(scales * (weight + left @ right.T))

    def forward(self) -> Tensor:
        """Loss of one fresh batch: the mean squared errors of all layers, with noisy targets."""
        losses = []
        for layer, truth in zip(self.layers, self.truths, strict=True):
            x = self._normal(BATCH, truth.shape[1])
            y = x @ truth.T + NOISE * self._normal(BATCH, len(truth))
            losses.append((layer(x) - y).square().mean())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def excess(self) -> float:
        """Expected loss above that of the true weights, exactly: inputs are standard normal."""
        pairs = zip(self.layers, self.truths, strict=True)
        errors = [layer(torch.eye(truth.shape[1])) - truth.T for layer, truth in pairs]
        return sum(error.square().sum(dim=0).mean().item() for error in errors)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)


def train(
    seed: int, use_dora: bool, preset: str, rate: float, overrides: dict[str, object]
) -> tuple[float, RankFlow]:
    """Return the share of the excess loss that is left, and the engine."""
    torch.manual_seed(seed)
    problem = Planted(seed)
    before = problem.excess()
    config = LoraConfig(r=4, lora_alpha=4, use_dora=use_dora, target_modules=NAMES)
    model = get_peft_model(problem, config)
    budget = load_budget(preset, **{"rank": RANK, "seed": seed, **overrides})
    flow = RankFlow(model, budget, total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        problem().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        flow.step(optimizer)
    return problem.excess() / before, flow


def tune() -> None:
    for name, (use_dora, preset, _, overrides) in METHODS.items():
        for rate in RATES:
            left = [train(seed, use_dora, preset, rate, overrides)[0] for seed in TUNING_SEEDS]
            print(f"{name}, learning rate {rate:g}: {mean(left):.1%} left")


def main() -> None:
    left = {name: [train(seed, *METHODS[name])[0] for seed in SEEDS] for name in METHODS}
    table = Table("method", "left", *(f"seed {seed}" for seed in SEEDS), "more than hybrid")
    for name, values in left.items():
        more = [a - b for a, b in zip(values, left["hybrid"], strict=True)]
        mean_, more_ = (f"{mean(v):.1%} ± {stdev(v):.1%}" for v in (values, more))
        table.add_row(name, mean_, *(f"{value:.1%}" for value in values), more_)
    Console().print(table)


if __name__ == "__main__":
    tune() if "--tune" in sys.argv else main()
