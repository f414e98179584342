"""Choose how ranks change."""

from collections.abc import Sequence

from peft import PeftModel

from rankflow.adapters.sites import Site
from rankflow.resizing.masked import Masked
from rankflow.resizing.physical import Physical
from rankflow.resizing.resizer import Resizer
from rankflow.resizing.sharding import is_sharded
from rankflow.specs.budget import BudgetSpec


def choose_resizer(
    model: PeftModel, adapter_name: str, sites: Sequence[Site], budget: BudgetSpec
) -> Resizer:
    """Return what can change ranks under the engine that holds the model.

    Args:
        model: The model.
        adapter_name: The adapter.
        sites: Its sites.
        budget: The budget.

    Raises:
        RankFlowError: Ranks cannot change there, or not under this budget.
    """
    if is_sharded(model):
        return Masked(model, sites, budget)
    return Physical(model, adapter_name, sites, budget)
