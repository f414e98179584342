"""Dynamic-Rank DoRA (arXiv 2405.17357) against an independent dense reference.

The reference is written from the paper's formulas in numpy and float64. It forms every rank-1
matrix and every update in full, differentiates the network by hand, trains by plain gradient
descent with the regulariser in the loss, and prunes by its own count of components.
"""

import math
from dataclasses import dataclass

import numpy as np
import peft
import pytest
import torch
from torch import nn

from rankflow.engine import RankFlow
from rankflow.specs.budget import BudgetSpec

STEPS, EVERY = 120, 10
FINAL_RANK, START_RANK = 2, 3  # ceil(1.5 * 2)
WARMUP, PRUNING_ENDS = round(0.15 * STEPS), round(0.5 * STEPS)
ETA, RATE, ALPHA = 0.5, 0.5, 6
SHAPES = {"first": (9, 5), "second": (5, 9), "third": (9, 5), "fourth": (5, 9)}  # of equal cost
COST = 9 + 5 + 1


class Net(nn.Module):
    """Four linear layers without biases, tanh between them."""

    def __init__(self):
        super().__init__()
        for name, (out_features, in_features) in SHAPES.items():
            self.add_module(name, nn.Linear(in_features, out_features, bias=False))

    def forward(self, x):
        for name in SHAPES:
            x = torch.tanh(getattr(self, name)(x)) if name != "fourth" else getattr(self, name)(x)
        return x


def batch(step):
    generator = np.random.default_rng(step)
    x = generator.normal(size=(32, 5))
    return x, np.stack([np.sin(3 * x[:, 0]), x[:, 1] * x[:, 2], *x.T[2:]], axis=1)


@dataclass
class Layer:
    """One layer of the reference: W, s, the live components, and their smoothed scores."""

    W: np.ndarray
    scale: float
    A: np.ndarray
    B: np.ndarray
    c: np.ndarray
    magnitude: np.ndarray | None
    names: list
    smoothed: np.ndarray

    def update(self):
        parts = [self.c[i] * np.outer(self.B[:, i], self.A[i]) for i in range(len(self.c))]
        return sum(parts, np.zeros_like(self.W))

    def weight(self):
        V = self.W + self.scale * self.update()
        return V if self.magnitude is None else (self.magnitude / row_norms(V))[:, None] * V

    def scores(self):
        V = self.W + self.scale * self.update()
        rows = 1 if self.magnitude is None else (self.magnitude / row_norms(V))[:, None]
        whole = np.linalg.norm(rows * self.update()) + 1e-8
        return np.array(
            [
                np.linalg.norm(rows * self.c[i] * np.outer(self.B[:, i], self.A[i])) / whole
                for i in range(len(self.c))
            ]
        )

    def descend(self, gradient, regulariser):
        """One step of gradient descent, given the loss's gradient of the effective weight."""
        V = self.W + self.scale * self.update()
        if self.magnitude is not None:
            norms = row_norms(V)
            along = (gradient * V).sum(axis=1) / norms
            gradient = (self.magnitude / norms)[:, None] * gradient
        G = self.scale * gradient
        dA, dB, dc = np.zeros_like(self.A), np.zeros_like(self.B), np.zeros_like(self.c)
        for i in range(len(self.c)):
            a, b = self.A[i], self.B[:, i]
            dA[i] = self.c[i] * G.T @ b + regulariser * 2 * (a - a.mean()) / a.size
            dB[:, i] = self.c[i] * G @ a + regulariser * 2 * (b - b.mean()) / b.size
            dc[i] = b @ G @ a
        self.A, self.B, self.c = self.A - RATE * dA, self.B - RATE * dB, self.c - RATE * dc
        if self.magnitude is not None:
            self.magnitude = self.magnitude - RATE * along

    def keep(self, kept):
        self.A, self.B, self.c = self.A[kept], self.B[:, kept], self.c[kept]
        self.smoothed = self.smoothed[kept]
        self.names = [self.names[i] for i in kept]


def row_norms(V):
    return np.sqrt((V**2).sum(axis=1))


def loss_and_gradients(layers, step):
    """Mean squared error, and its gradient of every layer's effective weight, by hand."""
    x, y = batch(step)
    inputs, names = [x], list(layers)
    for name in names:
        z = inputs[-1] @ layers[name].weight().T
        inputs.append(z if name == names[-1] else np.tanh(z))
    error = inputs[-1] - y
    delta, gradients = 2 * error / error.size, {}
    for k in range(len(names) - 1, -1, -1):
        gradients[names[k]] = delta.T @ inputs[k]
        delta = delta @ layers[names[k]].weight() * (1 - inputs[k] ** 2)
    return (error**2).mean(), gradients


def reference_run(layers):
    """Train and prune; return each event's (step, scores by component, pruned, ranks)."""
    total, events = START_RANK * len(layers), []
    for step in range(STEPS):
        for layer in layers.values():  # the weights that this step's loss is taken at
            layer.smoothed = 0.9 * layer.smoothed + 0.1 * layer.scores()
        _, gradients = loss_and_gradients(layers, step)
        eta = ETA if step < PRUNING_ENDS else 0.0
        for name, layer in layers.items():
            layer.descend(gradients[name], eta / (2 * START_RANK * len(layers)))
        done = step + 1
        if WARMUP <= done <= PRUNING_ENDS and (
            (done - WARMUP) % EVERY == 0 or done == PRUNING_ENDS
        ):
            p = (done - WARMUP) / (PRUNING_ENDS - WARMUP)
            fraction = (1 - FINAL_RANK / START_RANK) * p**3
            events.append((done, *prune(layers, math.floor(total * (1 - fraction) + 1e-9), done)))
    return events


def prune(layers, remaining, done):
    """Keep the best components of all layers by one threshold."""
    scores = {
        (name, component): score / (1 - 0.9**done)
        for name, layer in layers.items()
        for component, score in zip(layer.names, layer.smoothed, strict=True)
    }
    kept = set(sorted(scores, key=scores.get, reverse=True)[:remaining])
    for name, layer in layers.items():
        layer.keep([i for i, component in enumerate(layer.names) if (name, component) in kept])
    return scores, set(scores) - kept, {name: len(layer.names) for name, layer in layers.items()}


def start(use_dora):
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=START_RANK, lora_alpha=ALPHA, use_dora=use_dora, target_modules=list(SHAPES)
    )
    model = peft.get_peft_model(Net(), config).double()
    magnitudes = sum(out for out, _ in SHAPES.values()) if use_dora else 0
    budget = BudgetSpec(
        # Exactly r_T and r_0 components a layer: the paper counts ranks, the budget parameters.
        params=FINAL_RANK * COST * len(SHAPES) + magnitudes,
        start=(START_RANK * COST * len(SHAPES) + magnitudes)
        / (FINAL_RANK * COST * len(SHAPES) + magnitudes)
        + 1e-9,
        schedule="cubic-late",
        warmup=0.15,
        cooldown=0.5,
        every=EVERY,
        components="gated",
        dem=ETA,
        score="frobenius",
        decay=0.9,
        policy="threshold",
        recycle=0.0,
        seed=1,
    )
    flow = RankFlow(model, budget, STEPS)
    layers = {
        site.name: Layer(
            W=site.layer.get_base_layer().weight.detach().numpy().copy(),
            scale=ALPHA / START_RANK,
            A=site.A.detach().numpy().copy(),
            B=site.B.detach().numpy().copy(),
            c=site.gate.detach().numpy().copy(),
            magnitude=site.magnitude.detach().numpy().copy() if use_dora else None,
            names=list(range(site.rank)),
            smoothed=np.zeros(site.rank),
        )
        for site in flow._sites
    }
    return model, flow, layers


def engine_run(model, flow):
    """Train with the engine; return its events in the form of the reference's."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    alive = {name: list(range(rank)) for name, rank in flow.ranks.items()}
    events = []
    for step in range(STEPS):
        x, y = (torch.from_numpy(t) for t in batch(step))
        loss = (model(x) - y).square().mean() + flow.penalty()
        optimizer.zero_grad()
        loss.backward()
        flow.observe()
        scores = flow._observers.tracker.scorers["components"].read().tolist()
        optimizer.step()
        named = [(name, component) for name, parts in alive.items() for component in parts]
        event = flow.step(optimizer)
        if event is None:
            continue
        pruned = {(change.site, alive[change.site][change.component]) for change in event.pruned}
        assert not event.born
        for name, component in pruned:
            alive[name].remove(component)
        ranks = {name: len(parts) for name, parts in alive.items()}
        assert ranks == event.ranks
        events.append((step + 1, dict(zip(named, scores, strict=True)), pruned, ranks))
    return events


@pytest.mark.parametrize("use_dora", [False, True], ids=["Dynamic-Rank DoRA", "with magnitudes"])
def test_scores_pruning_and_schedule_are_those_of_the_dense_reference(use_dora):
    model, flow, layers = start(use_dora)
    assert flow.ranks == dict.fromkeys(SHAPES, START_RANK)
    first, _ = loss_and_gradients(layers, 0)
    expected, found = reference_run(layers), engine_run(model, flow)
    assert [event[0] for event in found] == [event[0] for event in expected]
    for (_, scores, pruned, ranks), (_, ref_scores, ref_pruned, ref_ranks) in zip(
        found, expected, strict=True
    ):
        # The engine's averages are float32.
        assert scores == pytest.approx(ref_scores, rel=2e-5, abs=1e-7)
        assert pruned == ref_pruned
        assert ranks == ref_ranks
    assert sum(ranks.values()) == FINAL_RANK * len(SHAPES)
    assert sum(len(event[2]) for event in found) == (START_RANK - FINAL_RANK) * len(SHAPES)
    assert len(set(ranks.values())) > 1  # the layers ended at different ranks
    for site in flow._sites:
        layer = layers[site.name]
        for mine, dense in ((site.A, layer.A), (site.B, layer.B), (site.gate, layer.c)):
            np.testing.assert_allclose(mine.detach().numpy(), dense, rtol=1e-7, atol=1e-9)
    last, _ = loss_and_gradients(layers, 0)
    assert last < 0.7 * first  # it learned


def test_the_cubic_schedule_prunes_the_papers_counts():
    model, flow, _ = start(use_dora=False)
    counts = {step: sum(ranks.values()) for step, _, _, ranks in engine_run(model, flow)}
    # 12 components, of which a third goes by p^3 between steps 18 and 60: 12 - 4 p^3, rounded down
    assert counts == {18: 12, 28: 11, 38: 11, 48: 10, 58: 8, 60: 8}


def test_the_regulariser_ends_with_pruning():
    model, flow, _ = start(use_dora=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        assert (flow.penalty() > 0) == (step < PRUNING_ENDS)
        x, y = (torch.from_numpy(t) for t in batch(step))
        (model(x) - y).square().mean().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        flow.step(optimizer)
