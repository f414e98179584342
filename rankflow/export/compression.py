"""What a compression is asked for, and what is told of it."""

from dataclasses import dataclass
from typing import Literal

from rankflow.adapters.stock import exactly
from rankflow.errors import SpecError
from rankflow.records import CurvePoint
from rankflow.specs.budget import BudgetSpec, load_budget

Worth = Literal["energy", "loss"]


@dataclass(frozen=True, slots=True)
class Compression:
    """What a compression left, and at what price.

    Errors are relative Frobenius norms of how far the weights are from those of the adapter before;
    see ``rankflow.export.select``.

    Attributes:
        ranks_before: Rank of each site before, by site name.
        ranks: Rank of each site now, by site name; 0 where nothing is left.
        magnitudes: Whether each site has a DoRA magnitude now, by site name.
        parameters_before: Trainable adapter parameters before.
        parameters: Trainable adapter parameters now.
        error: Of all sites together, relative to what the adapter changed.
        errors: Of each site, relative to what the adapter changed there, by site name.
        worth: What the components were chosen by.
        curve: The error at other budgets, from the smallest to the whole adapter.
    """

    ranks_before: dict[str, int]
    ranks: dict[str, int]
    magnitudes: dict[str, bool]
    parameters_before: int
    parameters: int
    error: float
    errors: dict[str, float]
    worth: Worth
    curve: tuple[CurvePoint, ...]

    @property
    def rank_pattern(self) -> dict[str, int]:
        """The ranks for ``peft.LoraConfig(rank_pattern=...)``, by exact site names.

        PEFT has no rank 0, so sites with nothing left are missing: name the others as its
        ``target_modules``.
        """
        return {exactly(site): rank for site, rank in self.ranks.items() if rank > 0}

    @property
    def frozen_budget(self) -> BudgetSpec:
        """The ranks as a budget of the ``frozen`` policy, to train at them anew or from here on."""
        ranks = {exactly(site): rank for site, rank in self.ranks.items()}
        overrides = {"policy": "frozen", "params": self.parameters}
        off = [site for site, on in self.magnitudes.items() if not on]
        if 0 < len(off) < len(self.magnitudes):
            ranks |= {exactly(f"{site}.magnitude"): 0 for site in off}
            overrides["magnitude"] = "budgeted"
        return load_budget("fixed", ranks=ranks, **overrides)


@dataclass(frozen=True, slots=True)
class Request:
    """What an adapter is to be compressed to: a budget or an error, and never both.

    Attributes:
        budget: A budget spec, or a number of parameters.
        error: The largest relative error allowed.
        is_calibrated: Whether components are chosen by what they are worth to a loss.

    Raises:
        SpecError: Both are given, or neither, or the error is negative, or magnitudes may be
            folded into components that are calibrated.
    """

    budget: BudgetSpec | int | None
    error: float | None
    is_calibrated: bool = False

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.error is None):
            raise SpecError(
                "a compression needs a budget or an error, and not both; give one of them"
            )
        if self.error is not None and self.error < 0:
            raise SpecError(f"error = {self.error}: a relative error is at least 0, as in 0.01")
        if self.is_calibrated and True in self.ways:
            raise SpecError(
                "calibration scores the components that there are, not those that magnitudes are "
                "folded into; set magnitude = 'always', or choose by energy"
            )

    @property
    def spec(self) -> BudgetSpec | None:
        """The budget spec, if it is one."""
        return self.budget if isinstance(self.budget, BudgetSpec) else None

    @property
    def ways(self) -> tuple[bool, ...]:
        """Whether to fold the magnitudes into the components; with both, the nearer one wins."""
        modes = {"always": (False,), "never": (True,), "budgeted": (False, True)}
        return modes["always" if self.spec is None else self.spec.magnitude]

    def bounds_of(self, site: str) -> tuple[int, int | None]:
        """Smallest and largest rank that a site may be left with."""
        return (0, None) if self.spec is None else self.spec.bounds_of(site)
