"""Compress a trained adapter under a parameter budget, whoever trained it.

The adapter is taken apart into orthogonal components (``rankflow.export.decompose``), and those
that stay are chosen over all sites together (``rankflow.export.select``), by their energy or by
what they are worth to a measured loss (``rankflow.export.calibrate``).
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor

from rankflow import surgery
from rankflow.adapters.base_weight import base_rows, count_base_parameters
from rankflow.adapters.magnitude import empty_magnitude
from rankflow.adapters.sites import Site, find_sites
from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import check_base, sync_config
from rankflow.errors import ExportError, SpecError
from rankflow.export.calibrate import Loss, loss_scores
from rankflow.export.compression import Compression, Request
from rankflow.export.decide import Adapter, Remainder, Score, decide
from rankflow.export.decompose import AdaptedMatrix
from rankflow.specs.budget import BudgetSpec


def compress(
    model: PeftModel,
    budget: BudgetSpec | int | None = None,
    *,
    error: float | None = None,
    adapter_name: str = "default",
    loss: Loss | None = None,
    batches: Iterable[Any] | None = None,
) -> Compression:
    """Compress a LoRA or DoRA adapter in place, wholly or not at all.

    Of a budget spec these keys count: the target; the bounds on ranks; ``magnitude``, where
    ``always`` keeps the magnitudes that there are, ``never`` folds them into the components, and
    ``budgeted`` does what errs less; and a ``policy`` that prescribes ranks (``uniform``,
    ``random``, ``frozen``), while any other stands for the knapsack. All that speaks of time,
    of training and of scores is ignored. Components that are zero go in any case. An optimizer made
    before does not train the adapter any more.

    Args:
        model: A model with an adapter of any ranks, its base weights unmerged.
        budget: What may be left: a budget from ``load_budget``, or a number of parameters,
            magnitudes included.
        error: Instead of a budget, the largest relative error allowed; the smallest adapter within
            it is kept.
        adapter_name: The adapter.
        loss: From a batch to the loss of the model on it: components are then chosen by what they
            are worth to it, instead of by their energy.
        batches: The calibration set for ``loss``, batches of one size.

    Returns:
        What is left, and the error at this and at other budgets.

    Raises:
        SpecError: Not exactly one of ``budget`` and ``error``, or ``loss`` without ``batches``.
        BudgetError: The budget is more than the adapter has or less than its bounds and magnitudes
            need, or the error is out of reach.
        ExportError: The adapter cannot be compressed.
        RankFlowError: The loss is not fit for calibration.
        SiteError: The model has no such adapter, or it changed the base weights or biases.
    """
    request = Request(budget, error, is_calibrated=loss is not None)
    if (loss is None) != (batches is None):
        raise SpecError("calibration needs both loss and batches; give both, or neither")
    sites = find_sites(model, adapter_name)
    _check_sites(model, sites, adapter_name)
    score: Score | None = None
    if loss is not None and batches is not None:
        score = partial(loss_scores, model, sites, loss=loss, batches=batches)
    decision = decide(_describe(model, sites, request), request, score)
    pairs = zip(sites, decision.remainders(), strict=True)
    surgery.replace(sites, [_rebuild(site, left) for site, left in pairs])
    sync_config(model, adapter_name, sites)
    for site in sites:
        translate_state_dicts(site.layer, adapter_name)
    return decision.record


def _check_sites(model: PeftModel, sites: Sequence[Site], adapter_name: str) -> None:
    config = model.peft_config[adapter_name]
    check_base(config.init_lora_weights, config.bias, adapter_name)
    for site in sites:
        if site.gate is not None:
            raise ExportError(
                f"site {site.name!r} has gated components; export the adapter, which folds the "
                "gates into B, and compress what was exported"
            )
        if site.layer.merged:
            raise ExportError(
                f"site {site.name!r} is merged into its base weight; call model.unmerge_adapter() "
                "first"
            )


def _describe(model: PeftModel, sites: Sequence[Site], request: Request) -> Adapter:
    by_name = {site.name: site for site in sites}
    return Adapter(
        sites=tuple(site.describe(*request.bounds_of(site.name)) for site in sites),
        matrices=tuple(AdaptedMatrix.of(site) for site in sites),
        weight_of=lambda name: base_rows(by_name[name].layer),
        parameters=sum(site.parameters for site in sites),
        base_parameters=lambda: count_base_parameters(model),
        bytes_per_parameter=sites[0].A.element_size(),
    )


def _rebuild(site: Site, left: Remainder) -> dict[str, Tensor]:
    """Return the site's tensors with what is left, by the names of ``Site.install``."""
    rank = len(left.A)
    tensors = {
        "A": left.A.to(site.A).view(rank, *site.A.shape[1:]),
        "B": left.B.to(site.B).view(len(left.B), rank, *site.B.shape[2:]),
    }
    slot, old = site.magnitude_slot, site.magnitude
    if slot is None or old is None:
        return tensors
    new = left.magnitude
    return tensors | {
        "magnitude": empty_magnitude(slot) if new is None else new.to(old).view(old.shape)
    }
