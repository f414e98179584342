"""Does rank go where it is needed? A problem whose right answer is known.

Twelve parallel linear layers of different shapes, each with its own noisy regression target. Only
three of the targets differ from what the frozen layers give, by updates of rank 2, 4 and 6. The
budget is rank 1 on average: enough for those three, if nothing is wasted on the other nine.

    python examples/planted.py
"""

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rankflow import RankFlow, load_budget

SHAPES = [(32, 48), (48, 32), (64, 40), (24, 64), (40, 40), (56, 24)]
SHAPES += [(32, 32), (48, 56), (64, 24), (40, 64), (24, 40), (56, 48)]
TRUE_RANKS = {2: 2, 6: 4, 4: 6}  # layer -> rank of its true update
NOISE = 0.1
STEPS = 600
BATCH = 64


class Planted(nn.Module):
    """The layers, their targets, and a stream of data."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in SHAPES)
        self.targets = []
        for i, layer in enumerate(self.layers):
            n, m = SHAPES[i]
            layer.weight.data = self._normal(m, n) / n**0.5
            rank = TRUE_RANKS.get(i, 0)
            left, right = (torch.linalg.qr(self._normal(k, rank)).Q for k in (m, n))
            self.targets.append(layer.weight.detach() + left @ right.T)

    def forward(self) -> Tensor:
        """Loss of one fresh batch: the mean squared errors of all layers."""
        return sum(self._error(i, BATCH, NOISE) for i in range(len(SHAPES)))

    @torch.no_grad()
    def loss(self) -> float:
        """Loss on a large fixed set, noise of the targets included."""
        state = self.random.get_state()
        self.random.manual_seed(10**6)
        loss = sum(self._error(i, 4096, NOISE).item() for i in range(len(SHAPES)))
        self.random.set_state(state)
        return loss

    def _error(self, i: int, rows: int, noise: float) -> Tensor:
        x = self._normal(rows, SHAPES[i][0])
        y = x @ self.targets[i].T + noise * self._normal(rows, SHAPES[i][1])
        return (self.layers[i](x) - y).square().mean()

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)


@dataclass(frozen=True)
class Outcome:
    """What a budget made of the problem."""

    loss: float
    share: float  # of the parameters spent, in the three layers that need them
    flow: RankFlow


def train(seed: int, preset: str, **overrides: object) -> Outcome:
    """Train one budget on the problem."""
    torch.manual_seed(seed)
    problem = Planted(seed)
    names = [f"layers.{i}" for i in range(len(SHAPES))]
    model: PeftModel = get_peft_model(problem, LoraConfig(r=4, lora_alpha=4, target_modules=names))
    flow = RankFlow(model, load_budget(preset, rank=1, **overrides), total_steps=STEPS)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    for _ in range(STEPS):
        problem().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        flow.step(optimizer)
    spent = {site.name: site.component_cost * flow.ranks[site.name] for site in flow.resolved.sites}
    needed = sum(spent[f"layers.{i}"] for i in TRUE_RANKS)
    return Outcome(problem.loss(), needed / sum(spent.values()), flow)


def oracle(seed: int) -> Outcome:
    """Train the true ranks."""
    ranks = {f"layers.{i}": TRUE_RANKS.get(i, 0) for i in range(len(SHAPES))}
    return train(seed, "fixed", policy="frozen", ranks=ranks)


def main(seed: int = 0) -> None:
    table = Table("budget", "loss", "in the three layers", "their ranks")
    rows = {"true ranks 2, 4, 6": oracle(seed), "uniform rank": train(seed, "fixed")}
    for score in ("taylor", "sensitivity", "fisher"):
        rows[f"by {score}"] = train(seed, "reallocate", score=score)
    for name, outcome in rows.items():
        ranks = " ".join(str(outcome.flow.ranks[f"layers.{i}"]) for i in TRUE_RANKS)
        table.add_row(name, f"{outcome.loss:.4f}", f"{outcome.share:.0%}", ranks)
    Console().print(table)


if __name__ == "__main__":
    main()
