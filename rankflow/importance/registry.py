"""The scorers by name."""

from collections.abc import Sequence
from typing import assert_never

from rankflow.adapters.sites import Site
from rankflow.importance.controls import RandomScore, UniformScore
from rankflow.importance.gate import Fisher, Taylor
from rankflow.importance.magnitudes import make_magnitude_scorer
from rankflow.importance.norms import Frobenius, Norm
from rankflow.importance.scorer import Scorer
from rankflow.importance.sensitivity import Sensitivity
from rankflow.importance.tangential import Tangential
from rankflow.specs.budget import BudgetSpec, Score


def make_scorers(budget: BudgetSpec, sites: Sequence[Site]) -> dict[str, Scorer]:
    """Make what a budget asks for: the scorers of ``components`` and, if covered, ``magnitudes``.

    Args:
        budget: The budget spec.
        sites: The sites.
    """
    score, decay, seed = budget.score, budget.decay, budget.seed
    scorers = {"components": make_scorer(score, sites, decay=decay, seed=seed)}
    if budget.magnitude == "budgeted":
        scorers["magnitudes"] = make_magnitude_scorer(score, sites, decay=decay, seed=seed)
    return scorers


def make_scorer(name: Score, sites: Sequence[Site], *, decay: float, seed: int) -> Scorer:
    """Make the scorer of that name.

    Args:
        name: A score's name in a budget spec.
        sites: The sites whose components are scored.
        decay: Decay of the moving average, in [0, 1), where the score has one.
        seed: Seed of the random control.
    """
    match name:
        case "frobenius":
            return Frobenius(sites, decay)
        case "norm":
            return Norm(sites)
        case "sensitivity":
            return Sensitivity(sites, decay)
        case "taylor":
            return Taylor(sites, decay)
        case "fisher":
            return Fisher(sites, decay)
        case "random":
            return RandomScore(sum(site.rank for site in sites), seed, sites[0].A.device)
        case "tangential":
            return Tangential(sites)
        case "uniform":
            return UniformScore(sites)
        case _:
            assert_never(name)
