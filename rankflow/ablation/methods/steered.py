"""LoRA and DoRA under a RankFlow budget: the plain methods, the dynamic ones, and the controls.

Plain LoRA and DoRA are PEFT's layers under the ``fixed`` budget, which fits any number of
parameters by giving some sites one component more than others. DoRA is computed by RankFlow's
forward, which equals PEFT's to rounding.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from peft import PeftModel

from rankflow.ablation.methods.method import Built, Setting, UnsupportedError
from rankflow.ablation.methods.peft_tuners import merge_copy
from rankflow.ablation.methods.truncate import truncate
from rankflow.ablation.records import RankHistory
from rankflow.adapters.sites import find_sites
from rankflow.specs.ablation import MethodSpec
from rankflow.specs.budget import BudgetSpec, load_budget
from rankflow.training.adapter import add_adapter
from rankflow.training.models import BaseModel


@dataclass(frozen=True, slots=True)
class Steered:
    """A LoRA or DoRA adapter under a budget of RankFlow's.

    Attributes:
        summary: One line for people.
        source: The paper.
        preset: The budget's preset.
        use_dora: Whether the adapter is DoRA.
        rate: A usual learning rate.
        overrides: Other keys of the budget.
        factor: Its budget as a multiple of the ablation's.
        rank_stabilised: Whether the scale is ``alpha / sqrt(rank)`` instead of ``alpha / r``.
        quantised: Whether the base weights are in 4 bits.
        truncates: Whether the trained adapter is cut to the ablation's budget by SVD.
        follows: The method whose learned ranks it keeps from its first step on.
        rows: Rows of VeRA's random matrices, which bound what it can train; 0 where components are
            trained themselves.
    """

    summary: str
    source: str
    preset: str = "fixed"
    use_dora: bool = False
    rate: float = 4e-3
    overrides: Mapping[str, Any] = field(default_factory=dict)
    factor: float = 1.0
    rank_stabilised: bool = False
    quantised: bool = False
    truncates: bool = False
    follows: str | None = None
    rows: int = 0

    @property
    def scalings(self) -> tuple[float, ...]:
        """Only the scale of the spec: the learning rate is tuned."""
        return (1.0,)

    @property
    def size_name(self) -> str:
        """The budget fits by itself."""
        return ""

    def varied(self, variant: MethodSpec) -> "Steered":
        """Return the variant that a spec declares."""
        use_dora = self.use_dora if variant.use_dora is None else variant.use_dora
        return replace(
            self,
            use_dora=use_dora,
            overrides={**self.overrides, **variant.budget},
            factor=variant.factor or self.factor,
            follows=variant.follows or self.follows,
            rate=variant.rate or self.rate,
        )

    def budget(self, parameters: int, seed: int) -> BudgetSpec:
        """Return the budget at a number of parameters.

        Raises:
            SpecError: An override is wrong.
        """
        vera = {"components": "vera", "max_rank": self.rows} if self.rows else {}
        params = int(self.factor * parameters)
        return load_budget(self.preset, params=params, seed=seed, **vera, **self.overrides)

    def sizes(self, base: BaseModel, setting: Setting) -> tuple[int, ...]:
        """None to choose."""
        return ()

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Put the adapter on; the engine is attached when training begins."""
        settings = {**setting.adapter, "use_dora": self.use_dora}
        if self.rank_stabilised:
            settings |= {"use_rslora": True, "r": max(1, round(setting.rank))}
        model = add_adapter(base, setting.model, settings)
        allowed = min(setting.parameters, self._capacity(model) or setting.parameters)
        budget = self.budget(allowed, setting.seed)
        if self.follows is not None:
            budget = _retrace(budget, setting.learned, self.follows)
        finish = partial(truncate, model, setting.parameters) if self.truncates else None
        return Built(model, budget=budget, finish=finish, merge=partial(merge_copy, model))

    def _capacity(self, model: PeftModel) -> int:
        """Return all that VeRA's sites can train: gates of rows, and of random rows; else 0."""
        if not self.rows:
            return 0
        vectors = 1 + self.use_dora
        return sum(
            vectors * site.out_features + min(self.rows, site.in_features, site.out_features)
            for site in find_sites(model)
        )


def _retrace(budget: BudgetSpec, learned: RankHistory | None, source: str) -> BudgetSpec:
    """Fix the ranks, and the magnitudes, at which another run ended."""
    if learned is None:
        raise UnsupportedError(f"the method '{source}' has learned no ranks to retrain")
    last = learned.moments[-1]
    ranks = {_exactly(site): rank for site, rank in zip(learned.sites, last.ranks, strict=True)}
    if budget.magnitude == "budgeted":
        off = [site for i, site in enumerate(learned.sites) if i not in last.magnitudes]
        ranks |= {_exactly(f"{site}.magnitude"): 0 for site in off}
    return budget.model_copy(update={"policy": "frozen", "ranks": ranks})


def _exactly(site: str) -> str:
    return f"^{re.escape(site)}$"
