"""The frozen records that cross layer boundaries: what is known, what is decided, what happened.

They hold numpy arrays and plain values only, so that deciding (``rankflow.allocation``) and
reporting (``rankflow.report``) never import torch.

Components are flattened in site order: first all components of site 0, then those of site 1, ...
A table of ranks ``(2, 0, 1)`` has three components, whose site indices are ``(0, 0, 2)``.
"""

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]

SiteKind = Literal["linear", "conv", "embedding"]


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """One adapted module, seen as a matrix of shape ``(out_features, in_features)``.

    Attributes:
        name: Module path from the base model's root, e.g. ``model.layers.0.self_attn.q_proj``.
        kind: What the adapted module is.
        in_features: Columns of the matrix view (convolution: ``in_channels * kh * kw``;
            embedding: the vocabulary).
        out_features: Rows of the matrix view (embedding: the embedding's width).
        has_magnitude: Whether the site may train a DoRA magnitude, one entry per output row.
        min_rank: Smallest rank that the budget spec allows here.
        max_rank: Largest rank that the budget spec and the matrix allow here.
        is_budgeted: Whether the budget may take and give the magnitude; else it is always there.
        has_gate: Whether each component trains a gate, a factor of its own.
        has_row_gate: Whether gates of components and of output rows are all that it trains (VeRA).
    """

    name: str
    kind: SiteKind
    in_features: int
    out_features: int
    has_magnitude: bool
    min_rank: int
    max_rank: int
    is_budgeted: bool = False
    has_gate: bool = False
    has_row_gate: bool = False

    @property
    def plain_cost(self) -> int:
        """Trainable parameters of one component of plain LoRA: a row of A and a column of B."""
        return self.in_features + self.out_features

    @property
    def component_cost(self) -> int:
        """Trainable parameters of one component, its gate included if it has one."""
        return 1 if self.has_row_gate else self.plain_cost + self.has_gate

    @property
    def fixed_cost(self) -> int:
        """Trainable parameters that no plan can take: factors of rows, a fixed magnitude."""
        vectors = self.has_row_gate + (self.has_magnitude and not self.is_budgeted)
        return self.out_features * vectors


@dataclass(frozen=True, slots=True)
class MagnitudeTable:
    """What is known of every budgeted magnitude at one moment; zeros at sites without one.

    Attributes:
        on: Which sites train theirs, shape ``(S,)``.
        scores: What each is worth, or promises where it is off, shape ``(S,)``.
        ages: Events that each has lived through since it was turned on, shape ``(S,)``.
    """

    on: BoolArray
    scores: FloatArray
    ages: IntArray


@dataclass(frozen=True, slots=True)
class ComponentTable:
    """What is known of every component at one moment; the only input of an allocation policy.

    Attributes:
        sites: The S sites, in a fixed order.
        ranks: Live components of each site, shape ``(S,)``.
        scores: Worth of each component, higher stays, shape ``(C,)`` with ``C = ranks.sum()``.
        ages: Events that each component has lived through since its birth, shape ``(C,)``.
        demand: Estimated score of one more component at each site, shape ``(S,)``.
        magnitudes: The magnitudes, if the budget covers them.
        magnitude_change: Mean of ``|m / n - 1|`` over each site's rows, shape ``(S,)``, 0 where no
            magnitude is trained; it decides nothing and is reported.
    """

    sites: tuple[SiteInfo, ...]
    ranks: IntArray
    scores: FloatArray
    ages: IntArray
    demand: FloatArray
    magnitudes: MagnitudeTable | None = None
    magnitude_change: FloatArray | None = None

    @property
    def site_index(self) -> IntArray:
        """Index of each component's site, shape ``(C,)``."""
        return np.repeat(np.arange(len(self.sites)), self.ranks)

    @property
    def component_costs(self) -> IntArray:
        """Trainable parameters of one component at each site, shape ``(S,)``."""
        return np.array([site.component_cost for site in self.sites], dtype=np.int64)

    @property
    def fixed_cost(self) -> int:
        """Trainable parameters that no plan can take, over all sites."""
        return sum(site.fixed_cost for site in self.sites)

    @property
    def min_ranks(self) -> IntArray:
        """Smallest allowed rank of each site, shape ``(S,)``."""
        return np.array([site.min_rank for site in self.sites], dtype=np.int64)

    @property
    def max_ranks(self) -> IntArray:
        """Largest allowed rank of each site, shape ``(S,)``."""
        return np.array([site.max_rank for site in self.sites], dtype=np.int64)

    def cost_of(self, ranks: IntArray, magnitudes: BoolArray | None = None) -> int:
        """Trainable adapter parameters at these ranks and budgeted magnitudes, each ``(S,)``."""
        return int(self.costs_of(ranks, magnitudes).sum())

    def costs_of(self, ranks: IntArray, magnitudes: BoolArray | None = None) -> IntArray:
        """Trainable parameters of each site, shape ``(S,)``, at ranks and magnitudes ``(S,)``."""
        fixed = np.array([site.fixed_cost for site in self.sites], dtype=np.int64)
        costs = fixed + self.component_costs * ranks
        return costs if magnitudes is None else costs + self.magnitude_costs * magnitudes

    @property
    def magnitude_costs(self) -> IntArray:
        """Trainable parameters of a budgeted magnitude at each site, shape ``(S,)``."""
        costs = [site.out_features if site.is_budgeted else 0 for site in self.sites]
        return np.array(costs, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one event will do, decided but not yet done.

    Attributes:
        keep: For each site, the ascending indices of its components that stay.
        births: For each site, the number of new components, shape ``(S,)``.
        magnitudes: Which sites train a magnitude from now on, shape ``(S,)``; None leaves all as
            they are.
    """

    keep: tuple[IntArray, ...]
    births: IntArray
    magnitudes: BoolArray | None = None

    @property
    def ranks(self) -> IntArray:
        """Rank of each site once the plan is carried out, shape ``(S,)``."""
        return np.array([len(k) for k in self.keep], dtype=np.int64) + self.births

    def sources(self, ranks: IntArray) -> IntArray:
        """Return where each component of the new table comes from.

        Args:
            ranks: Rank of each site before the plan, shape ``(S,)``.

        Returns:
            For each component after the plan its index in the table before, or -1 if newborn;
            survivors of a site come before its newborns.

        >>> plan = RankPlan(keep=(np.array([1]), np.array([0])), births=np.array([0, 2]))
        >>> plan.sources(np.array([2, 1]))
        array([ 1,  2, -1, -1])
        """
        first = np.cumsum(ranks) - ranks
        parts = [
            np.concatenate([keep + start, np.full(births, -1)])
            for keep, births, start in zip(self.keep, self.births, first, strict=True)
        ]
        return np.concatenate(parts).astype(np.int64)


@dataclass(frozen=True, slots=True)
class ComponentChange:
    """One component, or one magnitude, that an event removed or gave birth to.

    Attributes:
        site: The site's name.
        component: Its index in the site, before the event if pruned and after it if born; None
            for the site's magnitude.
        score: Its score if pruned; the demand that called for it if born.
        reason: Why, in a few words.
    """

    site: str
    component: int | None
    score: float
    reason: str


@dataclass(frozen=True, slots=True)
class RankEvent:
    """What one reallocation did.

    Attributes:
        index: Running number of the event, from 0.
        step: Optimizer steps taken before it.
        limit: Trainable adapter parameters that the budget allows from here on.
        spent_before: Trainable adapter parameters before the event.
        spent: Trainable adapter parameters after it; never above ``limit``.
        ranks_before: Rank of each site before the event, by site name.
        ranks: Rank of each site after it, by site name.
        importance: Sum of the scores of each site's components before the event, by site name.
        pruned: The components and magnitudes removed.
        born: The components and magnitudes added.
        seconds: Wall time of the event.
        magnitudes: Whether each site trains a magnitude after it, by site name; empty if the
            budget does not cover them.
        parameters: Trainable parameters of each site after it, by site name.
        magnitude_change: Mean of ``|m / n - 1|`` over the rows before the event, by the name of
            each site that trained a magnitude then.
    """

    index: int
    step: int
    limit: int
    spent_before: int
    spent: int
    ranks_before: dict[str, int]
    ranks: dict[str, int]
    importance: dict[str, float]
    pruned: tuple[ComponentChange, ...]
    born: tuple[ComponentChange, ...]
    seconds: float
    magnitudes: dict[str, bool] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    magnitude_change: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """The error of a compressed adapter at one budget.

    Attributes:
        parameters: The budget.
        error: Relative error if the components are chosen over all sites together.
        uniform_error: Relative error if every site keeps the same rank, as far as it has it.
    """

    parameters: int
    error: float
    uniform_error: float
