"""Decide what stays of an adapter, whether it is in memory or in a folder."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from rankflow.budgeting import check_patterns, target_parameters
from rankflow.errors import BudgetError, ExportError
from rankflow.export.compression import Compression, Request, Worth
from rankflow.export.decompose import (
    AdaptedMatrix,
    Decomposition,
    decompose,
    magnitude_after,
)
from rankflow.export.select import Candidates, choose, relative, smallest, tabulate, trace
from rankflow.records import CurvePoint, FloatArray, IntArray, SiteInfo
from rankflow.specs.budget import BudgetSpec


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter to compress, wherever it comes from.

    Attributes:
        sites: Its sites, with the bounds of the request.
        matrices: Their matrices.
        weight_of: From a site's name to its base weight, ``(out, in)``; asked where there is a
            magnitude.
        parameters: Its parameters as it is.
        base_parameters: Counts those of the base model; asked for a budget that is a share of them.
        bytes_per_parameter: Bytes of one parameter of the adapter.
    """

    sites: tuple[SiteInfo, ...]
    matrices: tuple[AdaptedMatrix, ...]
    weight_of: Callable[[str], Tensor]
    parameters: int
    base_parameters: Callable[[], int]
    bytes_per_parameter: int

    def take_apart(self, *, folds: bool) -> tuple[Decomposition, ...]:
        """Take every site apart.

        Args:
            folds: Whether to fold magnitudes into the components, as many as there are.
        """
        return tuple(
            decompose(
                matrix,
                None if matrix.magnitude is None else self.weight_of(matrix.name),
                most=len(matrix.A) if folds else None,
            )
            for matrix in self.matrices
        )


@dataclass(frozen=True, slots=True)
class Remainder:
    """What is left of a site, in float64 or the adapter's own type.

    Attributes:
        A: Right factor, shape ``(rank, in)``.
        B: Left factor, shape ``(out, rank)``.
        magnitude: Shape ``(out,)``; None where the site has none any more.
    """

    A: Tensor
    B: Tensor
    magnitude: Tensor | None


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

    def remainders(self) -> Iterator[Remainder]:
        """Yield what is left of each site."""
        for part, keep in zip(self.parts, self.keep, strict=True):
            yield Remainder(part.A[keep], part.B[:, keep], magnitude_after(part, keep))


Score = Callable[[Sequence[Decomposition]], list[FloatArray]]
"""From the components of every site to what each is worth to a loss, an array a site."""


def decide(adapter: Adapter, request: Request, score: Score | None = None) -> Decision:
    """Decide what stays of an adapter: in every way that a request allows, and the nearest wins.

    Args:
        adapter: The adapter.
        request: What it is to be compressed to.
        score: Scores the components; None for their energies.

    Raises:
        BudgetError: No way meets the request.
        ExportError: The adapter changes nothing, or cannot be taken apart.
    """
    limit = _limit(adapter, request)
    decisions, refusals = [], []
    for folds in request.ways:
        try:
            decisions.append(_decide(adapter, request, limit, score, folds=folds))
        except BudgetError as error:
            refusals.append(error)
    if not decisions:
        raise refusals[0]
    return min(decisions, key=lambda d: (d.record.error, d.record.parameters))


def _limit(adapter: Adapter, request: Request) -> int | None:
    """Return the parameters that may be left; None where an error decides."""
    if request.budget is None:
        return None
    limit = _target(adapter, request.budget)
    if limit > adapter.parameters:
        raise BudgetError(
            f"the budget of {limit:,} parameters is more than the {adapter.parameters:,} that the "
            "adapter has; choose a smaller one"
        )
    return limit


def _target(adapter: Adapter, budget: BudgetSpec | int) -> int:
    if not isinstance(budget, BudgetSpec):
        return budget
    check_patterns("bounds", budget.bounds, adapter.sites)
    base = 0 if budget.fraction is None else adapter.base_parameters()
    return target_parameters(budget, adapter.sites, base, adapter.bytes_per_parameter)


def _decide(
    adapter: Adapter, request: Request, limit: int | None, score: Score | None, *, folds: bool
) -> Decision:
    parts = adapter.take_apart(folds=folds)
    energies = tabulate(adapter.sites, parts, [part.energies for part in parts])
    candidates = energies if score is None else tabulate(adapter.sites, parts, score(parts))
    if candidates.change == 0:
        raise ExportError("the adapter changes no weight; train it before it is compressed")
    if request.error is not None:
        keep = smallest(candidates, request.error)
    else:
        assert limit is not None, "a request without an error has a limit"
        keep = choose(candidates, limit, request.spec)
    worth: Worth = "energy" if score is None else "loss"
    curve = trace(candidates, energies)
    return Decision(parts, keep, _record(adapter, candidates, keep, worth, curve))


def _record(
    adapter: Adapter,
    candidates: Candidates,
    keep: Sequence[IntArray],
    worth: Worth,
    curve: tuple[CurvePoint, ...],
) -> Compression:
    squares = candidates.squared_errors(keep)
    names = [site.name for site in adapter.sites]
    ranks = [len(kept) for kept in keep]
    parts = candidates.parts
    return Compression(
        ranks_before={matrix.name: len(matrix.A) for matrix in adapter.matrices},
        ranks=dict(zip(names, ranks, strict=True)),
        magnitudes={n: part.rows is not None for n, part in zip(names, parts, strict=True)},
        parameters_before=adapter.parameters,
        parameters=candidates.cost(ranks),
        error=relative(float(squares.sum()), candidates.change),
        errors={
            name: relative(float(square), part.change)
            for name, square, part in zip(names, squares, parts, strict=True)
        },
        worth=worth,
        curve=curve,
    )
