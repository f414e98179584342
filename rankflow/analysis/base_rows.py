"""Weights of a base model for the sites of an adapter that was saved."""

from collections.abc import Sequence

from torch import Tensor, nn

from rankflow.analysis.naming import match_names
from rankflow.analysis.weights import load_weights, weight_of
from rankflow.errors import RankFlowError
from rankflow.training.locating import locate


def read_base_rows(base: str, sites: Sequence[str]) -> dict[str, Tensor]:
    """Load a base model and return its weights at some sites, whatever stands around it there.

    Args:
        base: 'minilm', a folder that ``save_pretrained`` wrote, or a hub id.
        sites: Names in the model that the adapter was trained on; without any nothing is loaded.

    Returns:
        Weights of shape ``(out, in)``, by site name.

    Raises:
        RankFlowError: The model cannot be read, or lacks a site.
    """
    if not sites:
        return {}
    if not base:
        raise RankFlowError(
            "a DoRA adapter is divided by norms of the base model's weights, and its configuration "
            "does not name the model; give it with --base"
        )
    modules = dict(load_weights(locate(base)).model.named_modules())
    renaming = match_names(sites, modules)
    rows = {}
    for site in sites:
        name = None if renaming is None else renaming.translate(site)
        rows[site] = _rows(site, modules.get(name or ""), base)
    return rows


def _rows(site: str, module: nn.Module | None, base: str) -> Tensor:
    weight = None if module is None else weight_of(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        weight = module.weight.detach().flatten(1)
    if weight is None:
        raise RankFlowError(
            f"{base} has no weight at site {site!r} of the adapter; name the model that it was "
            "trained on"
        )
    return weight
