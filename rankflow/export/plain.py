"""Write sites as plain LoRA of scale 1: the tensors and the configuration that stock PEFT reads."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from rankflow.adapters.state_dicts import translate_state_dicts
from rankflow.adapters.stock import exactly
from rankflow.errors import ExportError
from rankflow.export.job import ExportJob
from rankflow.export.write import Check, peft_layout, write_adapter


@dataclass(frozen=True, slots=True)
class Factors:
    """One site's change as ``B A``.

    Attributes:
        A: Right factor in PEFT's own shape, rank first.
        B: Left factor in PEFT's own shape, rank second.
    """

    A: Tensor
    B: Tensor

    @property
    def rank(self) -> int:
        """Components."""
        return self.A.shape[0]


def write_plain(
    job: ExportJob, factors: Mapping[str, Factors], config: LoraConfig, check: Check
) -> Path:
    """Write factors, and what the adapter trained beside its sites, as a PEFT folder.

    Args:
        job: The export.
        factors: Of each site that is written, by its name.
        config: Describes them, see ``plain_config``.
        check: Called with the written folder before it gets its name.
    """
    kinds = {site.name: site.kind for site in job.sites}
    tensors = beside_sites(job)
    for name, pair in factors.items():
        prefix = f"base_model.model.{name}.lora_"
        if kinds[name] == "embedding":
            tensors |= {f"{prefix}embedding_A": pair.A, f"{prefix}embedding_B": pair.B}
        else:
            tensors |= {f"{prefix}A.weight": pair.A, f"{prefix}B.weight": pair.B}
    return write_adapter(
        job.path,
        tensors,
        layout=peft_layout(config.save_pretrained),
        about=replace(
            job.about,
            ranks={site.name: _rank(factors.get(site.name)) for site in job.sites},
            trained=None,
        ),
        check=check,
    )


def plain_config(
    job: ExportJob, rank: int, targets: set[str] | str, patterns: Mapping[str, int]
) -> LoraConfig:
    """Return a stock configuration of plain LoRA whose scale is 1 at every site.

    Args:
        job: The export.
        rank: LoRA's r, and its alpha.
        targets: PEFT's ``target_modules``.
        patterns: Rank of each site that has another one, by its name.
    """
    config: LoraConfig = copy.deepcopy(job.model.peft_config[job.adapter_name])
    config.r = config.lora_alpha = rank
    config.rank_pattern = {exactly(name): r for name, r in patterns.items()}
    config.alpha_pattern = dict(config.rank_pattern)
    config.target_modules = targets
    config.use_dora = config.use_rslora = False
    config.init_lora_weights = True  # some others demand an even rank when the adapter is loaded
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.inference_mode = True
    return config


def beside_sites(job: ExportJob) -> dict[str, Tensor]:
    """Return what the adapter trained beside its sites: task heads, biases, whole embeddings."""
    for site in job.sites:
        translate_state_dicts(site.layer, job.adapter_name)
    state = get_peft_model_state_dict(job.model, adapter_name=job.adapter_name)
    return {key: tensor for key, tensor in state.items() if ".lora_" not in key}


def refuse_beside_sites(job: ExportJob, consequence: str) -> None:
    """Refuse an adapter that trains more than its sites.

    Args:
        job: The export.
        consequence: What its readers make of that, and what to do instead.

    Raises:
        ExportError: It does.
    """
    others = sorted(beside_sites(job))
    if others:
        name = others[0].removeprefix("base_model.model.")
        raise ExportError(f"the adapter trains {name!r} beside its sites, and {consequence}")


def _rank(factors: Factors | None) -> int:
    return 0 if factors is None else factors.rank
