"""What a run knows of every component and magnitude: its worth, and how long it has lived."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site, magnitudes_on
from rankflow.allocation.demand import estimate_demand, price_by_gradient
from rankflow.errors import DivergenceError
from rankflow.importance.magnitudes import change_of_magnitudes
from rankflow.importance.scorer import Scorer
from rankflow.records import (
    ComponentTable,
    FloatArray,
    IntArray,
    MagnitudeTable,
    RankPlan,
    SiteInfo,
)
from rankflow.specs.budget import BudgetSpec


class Tracker:
    """Scores and ages, and what they say of components that do not exist.

    Args:
        budget: The budget spec.
        sites: The sites, at the ranks that they start with.
        infos: What the allocation knows of them, in the same order.
        scorers: Scorers of ``components`` and, if they are budgeted, of ``magnitudes``.
    """

    def __init__(
        self,
        budget: BudgetSpec,
        sites: Sequence[Site],
        infos: tuple[SiteInfo, ...],
        scorers: dict[str, Scorer],
    ) -> None:
        self._sites = tuple(sites)
        self._infos = infos
        self._protect = budget.protect
        self.scorers = scorers
        # What is there at the start has nothing to prove.
        self._ages = np.full(sum(site.rank for site in sites), budget.protect, dtype=np.int64)
        self._magnitude_ages = np.full(len(sites), budget.protect, dtype=np.int64)
        self._demand = np.zeros(len(sites))  # remembered for sites that die
        self._promise = np.zeros(len(sites))  # remembered for magnitudes that are turned off

    def observe(self, unclip: Tensor, accept: Tensor) -> None:
        """Fold in one step's gradients; see ``Scorer.observe``."""
        for scorer in self.scorers.values():
            scorer.observe(unclip, accept)

    def measure(self, energy: Tensor) -> FloatArray:
        """Bring what the device knows to the host: the one copy of an event.

        Args:
            energy: Largest singular value of the gradient of each site's weight outside of what its
                components span, shape ``(S,)``; 0 where it was not measured.

        Returns:
            What ``survey`` takes.
        """
        change = change_of_magnitudes(self._sites)
        read = [energy, change, *(scorer.read() for scorer in self.scorers.values())]
        return torch.cat(read).to("cpu", torch.float64).numpy()

    def survey(self, values: FloatArray) -> ComponentTable:
        """Return what is known of every component and magnitude.

        Args:
            values: What ``measure`` returned.

        Raises:
            DivergenceError: A score is not finite; nothing is remembered of this survey.
        """
        ranks = np.array([site.rank for site in self._sites], dtype=np.int64)
        ends = np.cumsum([len(ranks), len(ranks), ranks.sum()])
        energies, changes, scores, magnitude_scores = np.split(values, ends)
        self._check_finite(ranks, scores, magnitude_scores)
        mature = self._ages >= self._protect
        self._demand = estimate_demand(ranks, scores, mature, self._demand)
        demand = price_by_gradient(self._demand, ranks, energies)
        magnitudes = None
        if len(magnitude_scores) > 0:
            on = magnitudes_on(self._sites)
            self._promise = np.where(on, magnitude_scores, self._promise)
            magnitudes = MagnitudeTable(on, self._promise, self._magnitude_ages)
        return ComponentTable(self._infos, ranks, scores, self._ages, demand, magnitudes, changes)

    def _check_finite(self, ranks: IntArray, *scores: FloatArray) -> None:
        sites = (np.repeat(np.arange(len(ranks)), ranks), np.arange(len(ranks)))
        for of_site, values in zip(sites, scores, strict=True):
            bad = np.flatnonzero(~np.isfinite(values))
            if len(bad):
                raise DivergenceError(
                    f"{len(bad)} of {len(values)} scores are not finite, the first at site "
                    f"{self._infos[of_site[bad[0]]].name!r}, and no rank is decided by them; "
                    "gradients have grown beyond all bounds: lower the learning rate, or clip"
                )

    def follow(self, table: ComponentTable, plan: RankPlan, before: Savepoint) -> None:
        """Follow components and magnitudes through a resize that has been carried out.

        Args:
            table: What was known before.
            plan: What was done.
            before: What brings old state back whose memory is freed, if the resize is undone.
        """
        sources = plan.sources(table.ranks)
        self.scorers["components"].reindex(self._sites, torch.from_numpy(sources), before)
        self._ages = np.where(sources < 0, 0, table.ages[sources] + 1)
        if table.magnitudes is not None and plan.magnitudes is not None:
            stayed = table.magnitudes.on & plan.magnitudes
            kept = torch.from_numpy(np.where(stayed, np.arange(len(stayed)), -1))
            self.scorers["magnitudes"].reindex(self._sites, kept, before)
            self._magnitude_ages = np.where(stayed, table.magnitudes.ages + 1, 0)

    def state(self) -> dict[str, Any]:
        """Return the plain values that a resumed run needs; ``tensors`` has the rest."""
        return {
            "ages": self._ages.tolist(),
            "demand": self._demand.tolist(),
            "magnitude_ages": self._magnitude_ages.tolist(),
            "promise": self._promise.tolist(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return a copy of the scorers' state, by name."""
        return {
            f"{what}.{key}": value.clone()
            for what, scorer in self.scorers.items()
            for key, value in scorer.state().items()
        }

    def load(self, state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Restore what ``state`` and ``tensors`` returned."""
        self._ages = np.array(state["ages"], dtype=np.int64)
        self._demand = np.array(state["demand"])
        self._magnitude_ages = np.array(state["magnitude_ages"], dtype=np.int64)
        self._promise = np.array(state["promise"])
        for what, scorer in self.scorers.items():
            start = f"{what}."
            own = {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
            scorer.load(own)
