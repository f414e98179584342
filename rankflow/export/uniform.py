"""Export LoRA at one rank, as servers want it that know neither rank patterns nor DoRA.

Every site is padded with zeros to the largest rank, and its scale is baked into B, so that
``lora_alpha / r`` is 1 everywhere; a server that divides by the tensor's own rank gets 1 too.
"""

from pathlib import Path

from rankflow.adapters.rebuild import grow
from rankflow.adapters.sites import Site
from rankflow.adapters.stock import exact_targets
from rankflow.errors import ExportError
from rankflow.export.check import check_adapter, judge_exact
from rankflow.export.job import ExportJob
from rankflow.export.plain import Factors, plain_config, refuse_beside_sites, write_plain

# vllm/config/lora.py, MaxLoRARanks.
MAX_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_uniform(job: ExportJob) -> Path:
    """Write a LoRA adapter of one rank; a site of rank 0 becomes zeros.

    Raises:
        ExportError: The adapter is DoRA, or trains more than its sites, which servers do not load;
            the rank asked for is too small; or what was written does not read back.
    """
    _refuse_dora(job)
    refuse_beside_sites(job, "servers refuse or ignore what is not LoRA; export as merged")
    largest = max(site.rank for site in job.sites)
    rank = largest if job.options.rank is None else job.options.rank
    if rank < largest:
        raise ExportError(
            f"rank is {rank}, and the largest site has rank {largest}: padding adds components "
            "and drops none; ask for more, or compress the adapter first"
        )
    server_rank = smallest_max_lora_rank(rank)
    return write_plain(
        job,
        {site.name: _pad(site, rank) for site in job.sites},
        plain_config(job, rank, _short_targets(job), {}),
        lambda folder: check_adapter(job, folder, judge_exact(job), max_lora_rank=server_rank),
    )


def smallest_max_lora_rank(rank: int) -> int:
    """Return the smallest value of vLLM's ``--max-lora-rank`` that lets a rank in.

    Raises:
        ExportError: vLLM takes no such rank.

    >>> smallest_max_lora_rank(9)
    16
    """
    for allowed in MAX_LORA_RANKS:
        if rank <= allowed:
            return allowed
    raise ExportError(f"rank {rank} is more than the {MAX_LORA_RANKS[-1]} of vLLM; use merged")


def _refuse_dora(job: ExportJob) -> None:
    dora = [site.name for site in job.sites if site.magnitude is not None]
    if dora:
        raise ExportError(
            f"{len(dora)} of {len(job.sites)} sites have a DoRA magnitude, the first is "
            f"{dora[0]!r}, and vLLM, SGLang and LoRAX know no DoRA; export as merged, which is "
            "exact, or as lora-svd and that folder as peft-uniform"
        )


def _pad(site: Site, rank: int) -> Factors:
    missing = rank - site.rank
    A, B = site.A.detach(), (site.effective_B * site.scale).detach()
    return Factors(grow(A, 0, missing), grow(B, 1, missing))


def _short_targets(job: ExportJob) -> set[str] | str:
    """Return the last parts of the sites' names where they mean the same, as servers read them."""
    names = {site.name for site in job.sites}
    short = {name.rpartition(".")[2] for name in names}
    base = job.model.get_base_model()
    meant = {name for name, _ in base.named_modules() if name.rpartition(".")[2] in short}
    return short if meant == names else exact_targets(names, base)
