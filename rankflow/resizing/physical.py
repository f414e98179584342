"""Ranks that change by tensors of other shapes: one process, or several that hold copies."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch.optim import Optimizer

from rankflow import processes, surgery
from rankflow.adapters.dora import accelerate_site
from rankflow.adapters.newborns import Newborns
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import Site
from rankflow.adapters.stock import sync_config
from rankflow.allocation.policies import plan_from_ranks
from rankflow.budgeting import ResolvedBudget
from rankflow.errors import CheckpointError
from rankflow.fingerprint import fingerprints
from rankflow.growing import Growth
from rankflow.importance.norms import Norm
from rankflow.importance.registry import make_scorers
from rankflow.importance.scorer import Scorer
from rankflow.records import (
    BoolArray,
    ComponentTable,
    FloatArray,
    IntArray,
    RankPlan,
    SiteInfo,
)
from rankflow.reducer import Reducer
from rankflow.resizing.resizer import Resolve
from rankflow.specs.budget import BudgetSpec
from rankflow.tracking import Tracker


class Physical:
    """Resizes tensors; see ``Resizer``.

    Args:
        model: The model.
        adapter_name: The adapter.
        sites: Its sites.
        budget: The budget.
    """

    def __init__(
        self, model: PeftModel, adapter_name: str, sites: Sequence[Site], budget: BudgetSpec
    ) -> None:
        self._model = model
        self._adapter_name = adapter_name
        self._sites = tuple(sites)
        self._budget = budget
        self._reducer = Reducer(model)

    def resolve(self, infos: Sequence[SiteInfo], resolve: Resolve) -> ResolvedBudget:
        """Resolve the budget: tensors can take all ranks."""
        return resolve(infos)

    def accelerate(self, site: Site) -> None:
        """Give a DoRA site the fast forward."""
        accelerate_site(site)

    def scorers(self) -> dict[str, Scorer]:
        """Make the scorers that the budget asks for."""
        return make_scorers(self._budget, self._sites)

    def begin(
        self,
        infos: tuple[SiteInfo, ...],
        ranks: IntArray,
        magnitudes: BoolArray,
        newborns: Newborns,
    ) -> None:
        """Bring untrained sites to ranks and magnitudes."""
        old = np.array([site.rank for site in self._sites])
        scores = Norm(self._sites).read().to("cpu", torch.float64).numpy()
        table = untrained(infos, old, scores)
        plan = replace(plan_from_ranks(table, ranks), magnitudes=magnitudes)
        surgery.resize_in_place(self._sites, plan, newborns, self._budget.renormalise)
        self._reducer.invalidate()
        sync_config(self._model, self._adapter_name, self._sites)

    def restore(
        self, state: dict[str, Any], infos: tuple[SiteInfo, ...], newborns: Newborns
    ) -> None:
        """Bring sites to the ranks and magnitudes of a saved state."""
        if state.get("slots") is not None:
            raise CheckpointError(
                "the saved state is of a run under FSDP2, whose tensors have room for components "
                "that are not there; resume it under FSDP2, or export its adapter and train that"
            )
        ranks = np.array([state["ranks"][site.name] for site in self._sites])
        self.begin(infos, ranks, np.array(state["magnitudes"]), newborns)

    def state(self) -> dict[str, Any]:
        """Return nothing: shapes say all."""
        return {}

    def measure(
        self, check: Callable[[], None], tracker: Tracker, growth: Growth, what: str
    ) -> FloatArray:
        """Return what the first process knows: all know the same."""

        def read() -> FloatArray:
            check()
            return tracker.measure(growth.energy([site.live_rows for site in self._sites]))

        return processes.from_first(processes.in_all(read, what), what)

    def resize(
        self,
        plan: RankPlan,
        optimizer: Optimizer | None,
        newborns: Newborns,
        before: Savepoint,
    ) -> None:
        """Resize parameters and optimizer state, and PEFT's description of them."""
        surgery.resize(self._sites, plan, optimizer, newborns, self._budget.renormalise, before)
        self._reducer.invalidate()
        sync_config(self._model, self._adapter_name, self._sites)

    def agree(self, plan: RankPlan, optimizer: Optimizer | None, what: str) -> None:
        """Give all processes the newborns of the first, and compare everything else."""
        if processes.are_several():
            self._share_newborns(plan, what)
            prints = fingerprints(self._sites, optimizer)
            processes.check_equal(prints, [site.name for site in self._sites], what)

    def _share_newborns(self, plan: RankPlan, what: str) -> None:
        """Give all processes the newborns of the first: devices may differ in their last bits."""
        drawn = [
            factor.detach().narrow(axis, len(keep), int(births))
            for site, keep, births in zip(self._sites, plan.keep, plan.births, strict=True)
            for factor, axis in site.factors
            if births > 0
        ]
        processes.tensors_from_first(drawn, what)

    def everywhere(self, check: Callable[[], None], what: str) -> None:
        """Check here: all processes have the same weights."""
        check()

    def check_gradients(self, step: int) -> bool:
        """Check once after each resize that all processes have the same ones."""
        self._reducer.check(self._sites, step)
        return self._reducer.is_found or not processes.are_several()

    def close(self) -> None:
        """Leave the wrapper alone."""
        self._reducer.close()

    def undone_on_error(
        self, optimizer: Optimizer | None, what: str
    ) -> AbstractContextManager[None]:
        """Do nothing: no value is overwritten."""
        return nullcontext()


def untrained(infos: tuple[SiteInfo, ...], ranks: IntArray, scores: FloatArray) -> ComponentTable:
    """Return a table of components about which nothing but their scores is known."""
    return ComponentTable(
        infos, ranks, scores, np.zeros(ranks.sum(), np.int64), np.zeros(len(ranks))
    )
