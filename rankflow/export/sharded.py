"""Export an adapter whose tensors are spread over the processes of a job, under FSDP2.

All processes gather each tensor in turn, the first keeps it, leaves out the slots that hold no
component, and writes a stock PEFT folder at the exact ranks.
"""

from importlib.metadata import version
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.distributed.tensor import DTensor

from rankflow import processes
from rankflow.adapters.sites import Site
from rankflow.adapters.slots import Slots
from rankflow.adapters.stock import stock_config
from rankflow.errors import ExportError
from rankflow.export.job import ExportJob, refuse_nothing
from rankflow.export.report import ExportReport, measure_files, write_report
from rankflow.export.tokenizer import TOKENIZER
from rankflow.export.write import peft_layout, write_adapter
from rankflow.resizing.sharding import check_shards


def write_sharded(job: ExportJob) -> Path:
    """Write the live components of a sharded adapter; all processes have to call it.

    A component whose row of A and column of B are both zero does nothing and is left out. The base
    model is whole in no process, so outputs are not compared: every tensor is read back instead.

    Raises:
        ExportError: There is nothing to export, another format than PEFT's was asked for, or the
            folder holds something else.
        RankFlowError: The adapter is sharded in a way that is not followed.
    """
    if job.format.name != "peft":
        raise ExportError(
            f"format {job.format.name!r} needs the whole base model, and under FSDP2 no process "
            f"has it; export format 'peft', and then that folder: rankflow export FOLDER "
            f"--format {job.format.name}"
        )
    check_shards(job.sites)
    whole = _gather(job)
    what = f"exporting the adapter to {job.path}"
    processes.in_all(lambda: _write(job, whole) if processes.is_first() else None, what)
    return job.path


def _gather(job: ExportJob) -> dict[str, Tensor]:
    """Return the adapter's state dict, with all slots, in the first process; nothing in others."""
    state = get_peft_model_state_dict(job.model, adapter_name=job.adapter_name)
    whole = {}
    for key, tensor in state.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if processes.is_first():
            whole[key] = full.detach().cpu()
    return whole


def _write(job: ExportJob, whole: dict[str, Tensor]) -> None:
    state = dict(whole)
    for site in job.sites:
        _cut(site, state)
    refuse_nothing(job.sites, job.adapter_name)
    config = _config(job)
    write_adapter(
        job.path,
        state,
        layout=peft_layout(config.save_pretrained),
        about=job.about,
        check=lambda folder: _report(job, folder, config.r),
    )


def _cut(site: Site, state: dict[str, Tensor]) -> None:
    """Leave the live components of a site in its state, and in the site's slots."""
    name = "lora_embedding_{}" if site.kind == "embedding" else "lora_{}.weight"
    keys = [f"base_model.model.{site.name}.{name.format(factor)}" for factor in "AB"]
    A, B = (state.pop(key) for key in keys)
    is_live = A.flatten(1).any(dim=1) | B.flatten(1).T.any(dim=1)
    live = torch.nonzero(is_live).flatten()
    site.slots = Slots(site.A, site.B)
    site.slots.live = live.tolist()
    if site.magnitude is not None and not len(live):
        live = torch.tensor([0])  # beside a magnitude PEFT wants a component, and it is zero
    if len(live):
        state |= dict(zip(keys, (A[live], B[:, live]), strict=True))


def _config(job: ExportJob) -> LoraConfig:
    config = stock_config(job.model, job.adapter_name, job.sites)
    config.base_model_name_or_path = job.base_model or None
    config.inference_mode = True
    return config


def _report(job: ExportJob, folder: Path, largest_rank: int) -> None:
    parameters, size = measure_files(folder)
    report = ExportReport(
        format=job.format.name,
        rankflow=version("rankflow"),
        loads_in=job.format.loads_in,
        fails_in=job.format.fails_in,
        checked_by="safetensors, every tensor bit by bit",
        parameters=parameters,
        bytes=size,
        largest_rank=largest_rank,
        not_probed="the base model is spread over processes; rankflow export --base compares it",
        tokenizer=(folder / TOKENIZER).is_file(),
    )
    write_report(folder, report)
