"""A steered model of mixed kinds, widths and ranks (one of them 0), and its real gradients."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rankflow.adapters.sites import find_sites
from rankflow.importance.gradients import StepGradients

RANKS = {"embed": 2, "fan": 0, "first": 3, "second": 1, "conv": 4}


def set_rank(site, rank):
    """Give random factors of a rank, as if trained."""
    A = 0.4 * torch.randn(rank, *site.A.shape[1:], dtype=site.A.dtype)
    B = 0.4 * torch.randn(len(site.B), rank, *site.B.shape[2:], dtype=site.B.dtype)
    site.install(nn.Parameter(A), nn.Parameter(B))


@dataclass
class Steered:
    """A model, its sites, and the losses of a training run on it."""

    model: nn.Module
    sites: tuple

    def batch(self, step, rows=4):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(11, (rows, 4), generator=generator)
        return tokens, torch.randn(rows, 40, generator=generator, dtype=torch.float64)

    def loss(self, batch):
        tokens, target = batch
        out = self.model(tokens)
        return (out - target.to(out.dtype)).square().mean()

    def backward(self, step, scale=1.0):
        """Leave the gradients of one step, and nothing of the step before."""
        self.model.zero_grad(set_to_none=True)
        (scale * self.loss(self.batch(step))).backward()

    def components(self):
        """Site, row of A and column of B of every component in table order, with gradients."""
        for site in self.sites:
            for i in range(site.rank):
                a, b = site.A.detach()[i], site.B.detach()[:, i]
                da = None if site.A.grad is None else site.A.grad[i].flatten().double()
                db = None if site.B.grad is None else site.B.grad[:, i].flatten().double()
                yield site, a.flatten().double(), b.flatten().double(), da, db

    def factors(self, site):
        """m_j / n_j of every output row (1 without a magnitude) and W + s B A, all dense."""
        weight = site.layer.get_base_layer().weight.detach().double()
        rows = weight.T if site.name in ("embed", "fan") else weight.flatten(1)
        update = sum(torch.outer(b, a) for s, a, b, _, _ in self.components() if s is site)
        directions = rows + site.scale * update
        if site.magnitude is None:
            return torch.ones(len(rows), dtype=torch.float64), directions
        magnitude = site.magnitude.detach().flatten().double()
        return magnitude / directions.norm(dim=1), directions

    def drift(self, step):
        """Move all weights, as an optimizer would."""
        generator = torch.Generator().manual_seed(1000 + step)
        for site in self.sites:
            for p in (site.A, site.B):
                p.data += 0.05 * torch.randn(p.shape, generator=generator).to(p.dtype)

    def observe(self, scorer, gradients, loss_scale=1.0):
        """What the engine does between backward and the optimizer's step."""
        reading = gradients.read(loss_scale)
        scorer.observe(reading.unclip, reading.accept)


@pytest.fixture
def steer(mixed):
    """Make the steered model, equal at every call."""

    def make(*, use_dora=False, dtype=torch.float64, ranks=RANKS):
        torch.manual_seed(0)
        model = mixed(use_dora=use_dora).to(dtype)
        sites = find_sites(model)
        for site in sites:
            set_rank(site, ranks[site.name])
        return Steered(model, sites)

    return make


@pytest.fixture
def watch():
    """Watch gradients until the test ends."""
    watchers = []

    def make(sites):
        watchers.append(StepGradients(sites))
        return watchers[-1]

    yield make
    for watcher in watchers:
        watcher.close()


@pytest.fixture
def change_ranks():
    return set_rank
