"""Export an adapter as diffusers loads it, into a model or into a pipeline.

One file holds tensors and configuration: ``pytorch_lora_weights.safetensors``, whose keys begin
with the model's name in its pipelines, and whose header describes the adapter. Without that header
diffusers takes every scale to be 1.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig
from torch import nn

from rankflow.adapters.sites import Site, sites_in
from rankflow.errors import ExportError
from rankflow.export.check import Loader, check_adapter, judge_exact
from rankflow.export.diffusion import is_diffusers_model
from rankflow.export.job import ExportJob
from rankflow.export.peft import stock_state
from rankflow.export.plain import refuse_beside_sites
from rankflow.export.write import Layout, write_adapter

WEIGHTS: Final = "pytorch_lora_weights.safetensors"
_HEADER: Final = "lora_adapter_metadata"
# What tells ranks, scales and sites; other keys of a LoraConfig are for training, and an older PEFT
# would refuse those that it does not know.
_TOLD: Final = (
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "target_modules",
    "use_dora",
)


def write_diffusers(job: ExportJob) -> Path:
    """Write an adapter on a model of diffusers, exactly, each site at its own rank.

    Raises:
        ExportError: The base is no model into which diffusers loads adapters, the adapter trains
            more than its sites, or what was written does not read back as the live adapter.
    """
    base = job.model.get_base_model()
    _check_base(base)
    refuse_beside_sites(
        job, "diffusers loads LoRA alone; use peft, which PeftModel.from_pretrained loads"
    )
    prefix = _prefix(base)
    state = stock_state(job)
    return write_adapter(
        job.path,
        {f"{prefix}.{key.removeprefix('base_model.model.')}": t for key, t in state.items()},
        layout=_layout(job.model.peft_config[job.adapter_name], prefix),
        about=job.about,
        check=lambda folder: check_adapter(job, folder, judge_exact(job), loader=_loader(prefix)),
    )


def _check_base(base: nn.Module) -> None:
    if not is_diffusers_model(base):
        raise ExportError(
            f"the base is a {type(base).__name__}, which is no model of diffusers; use peft, or "
            "put the adapter on the pipeline's UNet or transformer itself"
        )
    from diffusers.loaders import PeftAdapterMixin

    if not isinstance(base, PeftAdapterMixin):
        raise ExportError(
            f"diffusers loads no adapters into a {type(base).__name__}, it has no "
            "load_lora_adapter; use peft, which PeftModel.from_pretrained loads"
        )


def _prefix(base: nn.Module) -> str:
    """Return what pipelines call such a model."""
    return "unet" if any("UNet" in kind.__name__ for kind in type(base).__mro__) else "transformer"


def _layout(config: LoraConfig, prefix: str) -> Layout:
    described: dict[str, Any] = {f"{prefix}.{key}": getattr(config, key) for key in _TOLD}
    return Layout(
        library="diffusers",
        loading=(
            f"# into the model alone: model.load_lora_adapter(..., prefix={prefix!r})\n"
            'pipeline.load_lora_weights("path/to/this/folder")'
        ),
        weights=WEIGHTS,
        header={_HEADER: json.dumps(described, default=sorted)},  # targets may be a set
        save_config=lambda folder: None,
    )


def _loader(prefix: str) -> Loader:
    def load(base: Any, folder: Path) -> Iterable[Site]:
        base.load_lora_adapter(folder, prefix=prefix, weight_name=WEIGHTS, adapter_name="default")
        return sites_in(base, "default")

    return Loader("diffusers' load_lora_adapter", load)
