r"""Export DoRA as plain LoRA: the best low-rank approximation of the change that it makes.

The change :math:`\frac{m}{n}(W + s B A) - W` holds :math:`(\frac{m}{n} - 1) W`, which has the rank
of W, so that no LoRA equals it; by Eckart and Young the truncated singular value decomposition
comes closest. Components are shared among the sites by what each removes from the squared error for
its parameters.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import torch

from rankflow.adapters.sites import Site
from rankflow.adapters.stock import exact_targets
from rankflow.allocation.knapsack import take_in_order
from rankflow.errors import ExportError
from rankflow.export.change import low_rank_rows, true_change
from rankflow.export.check import check_adapter
from rankflow.export.job import ExportJob
from rankflow.export.plain import Factors, plain_config, write_plain
from rankflow.records import FloatArray, IntArray

MAX_ERROR: Final = 0.01
# Rounding to the adapter's type moves the error that PEFT's tensors give by so many last digits.
_ROUNDINGS: Final = 8


def write_lora_svd(job: ExportJob) -> Path:
    """Write plain LoRA whose error is measured, by PEFT's own tensors, and told.

    Without ``rank`` every site gets the components that the error needs; with it, the adapter has
    at most the parameters of plain LoRA of that rank.

    Raises:
        ExportError: The error is above ``max_error``, or what was written does not read back.
    """
    limit = MAX_ERROR if job.options.max_error is None else job.options.max_error
    squares = [_squares(site) for site in job.sites]
    costs = np.array([site.in_features + site.out_features for site in job.sites])
    enough = ranks_within_error(squares, costs, limit)
    ranks = enough
    if job.options.rank is not None:
        ranks = ranks_within_budget(squares, costs, job.options.rank * int(costs.sum()))
        _check_error(_error(squares, ranks), limit, job, enough, costs)
    if not ranks.any():
        raise ExportError("the adapter changes no weight, so that no component is left to write")
    kept = {site.name: int(r) for site, r in zip(job.sites, ranks, strict=True) if r > 0}
    factors = {
        site.name: _truncate(site, kept[site.name]) for site in job.sites if site.name in kept
    }
    config = plain_config(
        job, max(kept.values()), exact_targets(kept, job.model.get_base_model()), kept
    )
    return write_plain(
        job,
        factors,
        config,
        lambda folder: check_adapter(
            job, folder, lambda loaded: _measure(job, loaded, limit), is_exact=False
        ),
    )


def ranks_within_error(squares: Sequence[FloatArray], costs: IntArray, error: float) -> IntArray:
    """Return the ranks that spend least, component by component, until the error is met.

    Args:
        squares: Squared singular values of each site's change, falling.
        costs: Parameters of a component of each site.
        error: Largest relative error in the Frobenius norm over all sites.

    >>> ranks_within_error([np.array([9.0, 1.0]), np.array([4.0])], np.array([2, 2]), 0.3)
    array([1, 1])
    """
    values, groups, order = _by_density(squares, costs)
    left = values.sum() - np.cumsum(values[order])
    needed = np.searchsorted(-left, -(error**2) * values.sum()) + 1 if values.any() else 0
    return np.bincount(groups[order[:needed]], minlength=len(squares))


def ranks_within_budget(squares: Sequence[FloatArray], costs: IntArray, budget: int) -> IntArray:
    """Return the ranks that remove most of the squared error for their parameters.

    Args:
        squares: Squared singular values of each site's change, falling.
        costs: Parameters of a component of each site.
        budget: Parameters that may be spent.

    >>> ranks_within_budget([np.array([9.0, 1.0]), np.array([4.0])], np.array([2, 2]), 4)
    array([1, 1])
    """
    values, groups, order = _by_density(squares, costs)
    taken = take_in_order(order[values[order] > 0], costs[groups], budget)
    return np.bincount(groups[taken], minlength=len(squares))


def _by_density(
    squares: Sequence[FloatArray], costs: IntArray
) -> tuple[FloatArray, IntArray, IntArray]:
    """Return all squares, their sites, and their order by what a parameter removes."""
    groups = np.repeat(np.arange(len(squares)), [len(s) for s in squares])
    values = np.concatenate(list(squares))
    return values, groups, np.argsort(-values / costs[groups], kind="stable")


def _error(squares: Sequence[FloatArray], ranks: IntArray) -> float:
    dropped = sum(float(s[r:].sum()) for s, r in zip(squares, ranks, strict=True))
    total = sum(float(s.sum()) for s in squares)
    return math.sqrt(dropped / total) if total else 0.0


def _check_error(
    error: float, limit: float, job: ExportJob, enough: IntArray, costs: IntArray
) -> None:
    if error <= limit:
        return
    rank = math.ceil(int(enough @ costs) / int(costs.sum()))
    raise ExportError(
        f"plain LoRA of rank {job.options.rank} leaves {error:.2%} of the change out, and "
        f"max_error is {limit:.2%}: DoRA's change (m/n)(W + sBA) - W holds (m/n - 1) W, which has "
        f"full rank. Rank {rank} would do; or allow a larger max_error, or export as merged, which "
        "is exact"
    )


def _squares(site: Site) -> FloatArray:
    if site.magnitude is None and site.rank == 0:
        return np.zeros(0)
    values = torch.linalg.svdvals(true_change(site)).square().cpu().numpy()
    if site.magnitude is None:
        values = values[: site.rank]  # the rest is rounding
    return np.asarray(values, dtype=np.float64)


def _truncate(site: Site, rank: int) -> Factors:
    """Return the first components of a site's change, the root of each value on either side."""
    U, S, Vh = torch.linalg.svd(true_change(site), full_matrices=False)
    root = S[:rank].sqrt()
    A, B = root[:, None] * Vh[:rank], U[:, :rank] * root
    return Factors(
        A.to(site.A.dtype).view(rank, *site.A.shape[1:]),
        B.to(site.B.dtype).view(site.B.shape[0], rank, *site.B.shape[2:]),
    )


def _measure(job: ExportJob, loaded: Mapping[str, Site], limit: float) -> float:
    """Return the relative error of what PEFT loaded.

    Raises:
        ExportError: It is above the limit, beyond what rounding explains.
    """
    error = total = 0.0
    for site in job.sites:
        change = true_change(site)
        total += float(change.square().sum())
        if site.name in loaded:
            change = change - low_rank_rows(loaded[site.name], torch.float64)
        error += float(change.square().sum())
    share = math.sqrt(error / total)
    rounding = _ROUNDINGS * max(torch.finfo(site.A.dtype).eps for site in job.sites)
    if not share <= limit + rounding:
        raise ExportError(
            f"what PEFT loads leaves {share:.2%} of the change out, and max_error is {limit:.2%}; "
            "allow a larger one, or export as merged, which is exact"
        )
    return share
