"""RankFlow: LoRA and DoRA adapters whose ranks follow a parameter budget while they train."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rankflow.adapters.dora import accelerate_dora as accelerate_dora
    from rankflow.engine import RankFlow as RankFlow
    from rankflow.export.card import AdapterFacts as AdapterFacts
    from rankflow.export.compress import compress as compress
    from rankflow.export.compression import Compression as Compression
    from rankflow.export.options import ExportOptions as ExportOptions
    from rankflow.export.peft import export_adapter as export_adapter
    from rankflow.integrations.huggingface import RankFlowCallback as RankFlowCallback
    from rankflow.integrations.huggingface import RankFlowTrainer as RankFlowTrainer
    from rankflow.report.scalars import event_scalars as event_scalars
    from rankflow.specs.budget import load_budget as load_budget

# Names load when first asked for: neither the command line's help nor a TensorBoard plugin should
# wait for torch.
_HOMES = {
    "AdapterFacts": "rankflow.export.card",
    "Compression": "rankflow.export.compression",
    "ExportOptions": "rankflow.export.options",
    "RankFlow": "rankflow.engine",
    "RankFlowCallback": "rankflow.integrations.huggingface",
    "RankFlowTrainer": "rankflow.integrations.huggingface",
    "accelerate_dora": "rankflow.adapters.dora",
    "compress": "rankflow.export.compress",
    "event_scalars": "rankflow.report.scalars",
    "export_adapter": "rankflow.export.peft",
    "load_budget": "rankflow.specs.budget",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rankflow' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(_HOMES)
