r"""Export DoRA as plain LoRA: the best low-rank approximation of the change that it makes.

The change :math:`\frac{m}{n}(W + s B A) - W` holds :math:`(\frac{m}{n} - 1) W`, which has the rank
of W, so that no LoRA equals it. Its components are chosen as in a compression, but a site may get
as many as its weight can hold.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import Site
from rankflow.adapters.stock import exact_targets
from rankflow.errors import ExportError
from rankflow.export.change import low_rank_rows, true_change
from rankflow.export.check import check_adapter
from rankflow.export.decompose import AdaptedMatrix, Decomposition, decompose
from rankflow.export.job import ExportJob
from rankflow.export.plain import Factors, plain_config, write_plain
from rankflow.export.select import Candidates, choose, smallest, tabulate
from rankflow.records import IntArray

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
    candidates = _take_apart(job)
    if candidates.change == 0:
        raise ExportError("the adapter changes no weight, so that no component is left to write")
    keep = _choose(candidates, job.options.rank, limit)
    chosen = zip(job.sites, candidates.parts, keep, strict=True)
    factors = {site.name: _factors(site, part, kept) for site, part, kept in chosen if len(kept)}
    ranks = {name: pair.rank for name, pair in factors.items()}
    targets = exact_targets(ranks, job.model.get_base_model())
    return write_plain(
        job,
        factors,
        plain_config(job, max(ranks.values()), targets, ranks),
        lambda folder: check_adapter(
            job, folder, lambda loaded: _measure(job, loaded, limit), is_exact=False
        ),
    )


def _take_apart(job: ExportJob) -> Candidates:
    """Take the sites apart with their scale in the components, as plain LoRA of scale 1 has it."""
    parts, infos = [], []
    for site in job.sites:
        matrix = AdaptedMatrix.of(site)
        baked = replace(matrix, B=site.scale * matrix.B, scale=1.0)
        weight = None if site.magnitude is None else base_rows(site.layer)
        parts.append(decompose(baked, weight, most=min(site.in_features, site.out_features)))
        infos.append(replace(site.describe(), has_gate=False, has_row_gate=False))
    return tabulate(infos, parts, [part.energies for part in parts])


def _choose(candidates: Candidates, rank: int | None, limit: float) -> tuple[IntArray, ...]:
    if rank is None:
        return smallest(candidates, limit)
    of_one_rank = sum(site.plain_cost for site in candidates.sites)
    keep = choose(candidates, rank * of_one_rank, None)
    error = candidates.error(keep)
    if error <= limit:
        return keep
    needed = candidates.cost([len(kept) for kept in smallest(candidates, limit)])
    raise ExportError(
        f"plain LoRA of rank {rank} leaves {error:.2%} of the change out, and max_error is "
        f"{limit:.2%}: DoRA's change (m/n)(W + sBA) - W holds (m/n - 1) W, which has full rank. "
        f"Rank {math.ceil(needed / of_one_rank)} would do; or allow a larger max_error, or export "
        "as merged, which is exact"
    )


def _factors(site: Site, part: Decomposition, kept: IntArray) -> Factors:
    rank, A, B = len(kept), part.A[kept], part.B[:, kept]
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
