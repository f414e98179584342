r"""The planted teacher: a task whose right answer is known, and that needs ranks and magnitudes.

Parallel linear layers of different shapes learn noisy outputs of the true weights

.. math:: W^*_i = \mathrm{diag}(g_i)\,(W_i + D_i),

where :math:`W_i` are the weights at the start. Some layers have an update :math:`D_i`, of
different ranks, some have row scales :math:`g_i` other than 1, one has both, most have neither. So
the budget that the truth needs is known exactly, and so is what an adapter leaves of the loss.

At ``rank = 2`` of the default design each part alone must fail. Uniform ranks are too low where
they are needed and wasted elsewhere; without magnitudes :math:`\mathrm{diag}(g - 1) W` costs its
full rank. Dynamic ranks beside magnitudes can have all that they need.

The layers are sites like any other, for LoRA, DoRA, VeRA, OFT or full fine-tuning. There is no
embedding, so methods that put tokens before the input cannot take part.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers.utils import ModelOutput

from rankflow.ablation.measures.modes import evaluating
from rankflow.errors import RankFlowError

_INPUTS = (32, 48, 64, 24, 40, 56, 32, 48, 64, 40, 24, 56)
_OUTPUTS = (48, 32, 40, 64, 40, 24, 32, 56, 24, 64, 40, 48)


@dataclass(frozen=True, slots=True)
class Design:
    """What is planted where.

    Attributes:
        shapes: ``(in_features, out_features)`` of each layer.
        ranks: Rank of the update of each layer that has one; its singular values are 1.
        rescaled: Layers with other row scales, drawn with mean 1.
        spread: Standard deviation of the row scales.
        noise: Standard deviation of the noise on every output.
    """

    shapes: tuple[tuple[int, int], ...] = tuple(zip(_INPUTS, _OUTPUTS, strict=True))
    ranks: Mapping[int, int] = field(default_factory=lambda: {2: 4, 7: 5, 4: 7})
    rescaled: Collection[int] = (0, 7, 9)
    spread: float = 0.4
    noise: float = 0.1

    @property
    def names(self) -> tuple[str, ...]:
        """Site names of the layers."""
        return tuple(f"layers.{i}" for i in range(len(self.shapes)))

    @property
    def true_ranks(self) -> dict[str, int]:
        """Rank that each site needs."""
        return {name: self.ranks.get(i, 0) for i, name in enumerate(self.names)}

    @property
    def true_magnitudes(self) -> frozenset[str]:
        """Sites that need a magnitude."""
        return frozenset(f"layers.{i}" for i in self.rescaled)

    @property
    def true_parameters(self) -> int:
        """Parameters that the truth needs: its components, and its magnitudes.

        >>> Design().true_parameters
        1664
        """
        components = sum(rank * sum(self.shapes[i]) for i, rank in self.ranks.items())
        return components + sum(self.shapes[i][1] for i in self.rescaled)


@dataclass(frozen=True, slots=True, eq=False)
class Problem:
    """The weights at the start, and the true ones.

    Attributes:
        seed: What they and the rows were drawn from.
        design: What is planted where.
        weights: Weights at the start, each ``(out, in)``.
        truths: True weights, each ``(out, in)``.
    """

    seed: int
    design: Design
    weights: tuple[Tensor, ...]
    truths: tuple[Tensor, ...]


def plant(seed: int, design: Design | None = None) -> Problem:
    """Draw a problem; the same seed and design give the same."""
    design = design or Design()
    random = torch.Generator().manual_seed(seed)
    pairs = [_plant_layer(design, i, random) for i in range(len(design.shapes))]
    weights, truths = zip(*pairs, strict=True)
    return Problem(seed, design, weights, truths)


def _plant_layer(design: Design, i: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    n, m = design.shapes[i]
    rank = design.ranks.get(i, 0)
    weight = torch.randn(m, n, generator=random) / n**0.5
    left, right = (torch.linalg.qr(torch.randn(k, rank, generator=random)).Q for k in (m, n))
    scales = 1 + design.spread * (i in design.rescaled) * torch.randn(m, 1, generator=random)
    return weight, scales * (weight + left @ right.T)


class PlantedRows(Dataset[dict[str, Tensor]]):
    """Inputs and noisy outputs of the truth.

    A row depends on the problem's seed and on its number alone, so that every method, and a run
    that goes on after a kill, sees the same ones.

    Args:
        problem: The problem.
        numbers: Numbers of the rows; other numbers are other rows.
    """

    def __init__(self, problem: Problem, numbers: range) -> None:
        self._seed, self._noise = problem.seed, problem.design.noise
        self._numbers = numbers
        self._truth = torch.block_diag(*problem.truths)  # (out, in), of all layers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return the rows of a batch; what a DataLoader calls."""
        out_features, in_features = self._truth.shape
        drawn = np.stack([self._draw(index, in_features + out_features) for index in indices])
        inputs, noise = torch.from_numpy(drawn).split([in_features, out_features], dim=1)
        labels = inputs @ self._truth.T + self._noise * noise
        return [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]

    def _draw(self, index: int, width: int) -> np.ndarray:
        random = np.random.default_rng((self._seed, self._numbers[index]))
        return random.standard_normal(width, dtype=np.float32)


@dataclass
class PlantedOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: Mean squared error of each layer, summed over the layers; None without labels.
        logits: Outputs of all layers side by side, shape ``(batch, out)``.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None


class PlantedModel(nn.Module):
    """The layers, as a model that a Trainer can train and PEFT can adapt.

    Args:
        problem: The problem.
    """

    truth: Tensor
    weights: Tensor

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self._shapes = problem.design.shapes
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for n, m in self._shapes)
        for layer, weight in zip(self.layers, problem.weights, strict=True):
            layer.weight = nn.Parameter(weight.clone())
        each = torch.cat([torch.full((m,), 1 / m) for _, m in self._shapes])
        self.register_buffer("weights", each, persistent=False)  # of each output in the loss
        truth = torch.block_diag(*problem.truths)
        self.register_buffer("truth", truth, persistent=False)
        changes = (truth - torch.block_diag(*problem.weights)).square().sum(dim=1)
        self.excess_at_start: float = (changes * each).sum().item()

    def forward(self, inputs: Tensor, labels: Tensor | None = None) -> PlantedOutput:
        """Apply each layer to its slice of the inputs.

        Args:
            inputs: Inputs of all layers side by side, shape ``(batch, in)``.
            labels: Outputs to learn, shape ``(batch, out)``.
        """
        slices = inputs.split([n for n, _ in self._shapes], dim=1)
        outputs = [layer(x) for layer, x in zip(self.layers, slices, strict=True)]
        logits = torch.cat(outputs, dim=1)  # (batch, out)
        if labels is None:
            return PlantedOutput(logits=logits)
        return PlantedOutput(self.squared_error(logits, labels), logits)

    def squared_error(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the mean squared error of each layer, summed over the layers."""
        return ((outputs - targets).square().mean(dim=0) * self.weights).sum()


def excess_share(model: nn.Module) -> float:
    r"""Return the share that is left of the expected loss above that of the true weights.

    Inputs are standard normal. The expectation is taken over the points
    :math:`\pm \sqrt{n}\, q_i` of an orthonormal basis, for which
    :math:`E \lVert (W - W^*) x + b \rVert^2 = \lVert W - W^* \rVert^2 + \lVert b \rVert^2` holds
    exactly. So for every adapter whose layers stay linear the result is exact, whatever the
    adapter; for others it is an estimate.

    Args:
        model: A ``PlantedModel``, adapted or not.

    Returns:
        1 at the start, 0 at the truth.

    Raises:
        RankFlowError: There is no ``PlantedModel`` in it.
    """
    planted = next((m for m in model.modules() if isinstance(m, PlantedModel)), None)
    if planted is None:
        raise RankFlowError(f"{type(model).__name__} holds no PlantedModel; adapt one, and pass it")
    points = _quadrature(planted.truth.shape[1]).to(planted.truth)
    with evaluating(model):
        excess = planted.squared_error(model(inputs=points)["logits"], points @ planted.truth.T)
    return excess.item() / planted.excess_at_start


def _quadrature(width: int) -> Tensor:
    """Return the points ``(2 width, width)``; turned at random, or a point would see one input."""
    random = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(width, width, generator=random)).Q * math.sqrt(width)
    return torch.cat([basis, -basis])


def rank_recovery(ranks: Mapping[str, int], true_ranks: Mapping[str, int]) -> float:
    """Return Spearman's correlation of learned ranks with the true ones; NaN if one has no spread.

    >>> round(rank_recovery({"a": 0, "b": 3, "c": 9}, {"a": 0, "b": 4, "c": 7}), 6)
    1.0
    """
    learned, true = [ranks[name] for name in true_ranks], list(true_ranks.values())
    if 1 in (len(set(learned)), len(set(true))):
        return math.nan
    return float(spearmanr(learned, true).statistic)


@dataclass(frozen=True, slots=True)
class MagnitudeRecovery:
    """Whether the magnitudes that train are those that are needed.

    Attributes:
        precision: Share of those that train which are needed; NaN if none trains.
        recall: Share of those needed which train.
    """

    precision: float
    recall: float


def magnitude_recovery(on: Iterable[str], needed: Collection[str]) -> MagnitudeRecovery:
    """Compare the sites that train a magnitude with those that need one.

    >>> magnitude_recovery({"a", "b"}, {"b"})
    MagnitudeRecovery(precision=0.5, recall=1.0)
    """
    on = set(on)
    right = len(on.intersection(needed))
    return MagnitudeRecovery(right / len(on) if on else math.nan, right / len(needed))
