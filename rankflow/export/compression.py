"""A compression from its request to its record, whether the adapter is in memory or in a folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from rankflow.adapters.stock import exactly
from rankflow.budgeting import check_patterns, target_parameters
from rankflow.errors import BudgetError, ExportError, SpecError
from rankflow.export.decompose import Decomposition
from rankflow.export.select import choose, relative, smallest, tabulate, trace
from rankflow.records import CurvePoint, FloatArray, IntArray, SiteInfo
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

    Raises:
        SpecError: Both are given, or neither, or the error is negative.
    """

    budget: BudgetSpec | int | None
    error: float | None

    def __post_init__(self) -> None:
        if (self.budget is None) == (self.error is None):
            raise SpecError(
                "a compression needs a budget or an error, and not both; give one of them"
            )
        if self.error is not None and self.error < 0:
            raise SpecError(f"error = {self.error}: a relative error is at least 0, as in 0.01")

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

    def limit(
        self,
        sites: Sequence[SiteInfo],
        before: int,
        *,
        base_parameters: int | None,
        bytes_per_parameter: int,
    ) -> int | None:
        """Return the parameters that may be left; None where an error decides.

        Args:
            sites: The adapter's sites.
            before: Parameters that it has.
            base_parameters: Parameters of the base model; None if that is not known.
            bytes_per_parameter: Bytes of one parameter of it.

        Raises:
            BudgetError: That is more than the adapter has, or a pattern matches no site.
        """
        if self.budget is None:
            return None
        limit = self._target(sites, base_parameters, bytes_per_parameter)
        if limit > before:
            raise BudgetError(
                f"the budget of {limit:,} parameters is more than the {before:,} that the adapter "
                "has; choose a smaller one"
            )
        return limit

    def _target(
        self, sites: Sequence[SiteInfo], base_parameters: int | None, bytes_per_parameter: int
    ) -> int:
        assert self.budget is not None, "the caller has looked"
        if not isinstance(self.budget, BudgetSpec):
            return self.budget
        check_patterns("bounds", self.budget.bounds, sites)
        if self.budget.fraction is not None and base_parameters is None:
            raise BudgetError(
                "fraction counts the base model's parameters, and the model is not loaded; give "
                "rank, params or bytes"
            )
        return target_parameters(self.budget, sites, base_parameters or 0, bytes_per_parameter)


@dataclass(frozen=True, slots=True)
class Anatomy:
    """An adapter, taken apart.

    Attributes:
        sites: Its sites, with the bounds of the request.
        parts: Their components.
        ranks: Rank of each site as it is.
        parameters: Its parameters as it is.
    """

    sites: tuple[SiteInfo, ...]
    parts: tuple[Decomposition, ...]
    ranks: tuple[int, ...]
    parameters: int


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of an adapter, decided but not yet done.

    Attributes:
        parts: Its components.
        keep: For each site the ascending indices of those that stay.
        record: What that leaves.
    """

    parts: tuple[Decomposition, ...]
    keep: tuple[IntArray, ...]
    record: Compression


def decide_best(attempt: Callable[[bool], Decision], request: Request) -> Decision:
    """Decide in every way that a request allows, and take the one that errs least.

    Args:
        attempt: Decides, with the magnitudes folded into the components or not.
        request: What the adapter is to be compressed to.

    Raises:
        BudgetError: No way meets the request.
    """
    decisions, refusals = [], []
    for folds in request.ways:
        try:
            decisions.append(attempt(folds))
        except BudgetError as error:
            refusals.append(error)
    if not decisions:
        raise refusals[0]
    return min(decisions, key=lambda d: (d.record.error, d.record.parameters))


def decide(
    anatomy: Anatomy,
    request: Request,
    limit: int | None,
    scores: Sequence[FloatArray] | None = None,
) -> Decision:
    """Decide what stays of an adapter.

    Args:
        anatomy: The adapter.
        request: What it is to be compressed to.
        limit: Parameters that may be left; None where an error decides.
        scores: What each component is worth to a loss, an array a site; None for its energy.

    Raises:
        BudgetError: The request cannot be met.
        ExportError: The adapter changes nothing.
    """
    by_energy = [part.energies for part in anatomy.parts]
    energies = tabulate(anatomy.sites, anatomy.parts, by_energy)
    candidates = energies if scores is None else tabulate(anatomy.sites, anatomy.parts, scores)
    if candidates.change == 0:
        raise ExportError("the adapter changes no weight; train it before it is compressed")
    if request.error is not None:
        keep = smallest(candidates, request.error)
    else:
        assert limit is not None, "a request without an error has a limit"
        keep = choose(candidates, limit, request.spec)
    squares = candidates.squared_errors(keep)
    names = [site.name for site in anatomy.sites]
    changes = [part.change for part in anatomy.parts]
    ranks = [len(kept) for kept in keep]
    has_magnitude = [part.rows is not None for part in anatomy.parts]
    record = Compression(
        ranks_before=dict(zip(names, anatomy.ranks, strict=True)),
        ranks=dict(zip(names, ranks, strict=True)),
        magnitudes=dict(zip(names, has_magnitude, strict=True)),
        parameters_before=anatomy.parameters,
        parameters=candidates.cost(ranks),
        error=relative(float(squares.sum()), candidates.change),
        errors={n: relative(float(s), c) for n, s, c in zip(names, squares, changes, strict=True)},
        worth="energy" if scores is None else "loss",
        curve=trace(candidates, energies),
    )
    return Decision(anatomy.parts, keep, record)
