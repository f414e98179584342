"""Load a written adapter by PEFT on a fresh copy of the base, and compare it with the live one."""

from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn

from rankflow.adapters.sites import Site, find_sites
from rankflow.errors import ExportError
from rankflow.export.copies import copy_base, evaluate
from rankflow.export.job import ExportJob
from rankflow.export.loading import without_repeated_notes
from rankflow.export.probe import (
    SEED,
    Probe,
    Unprobed,
    as_exported,
    compare,
    outputs_of,
    probe_model,
    tolerance,
)
from rankflow.export.report import ExportReport, measure_files, write_report
from rankflow.export.tokenizer import TOKENIZER

LOADER = "peft.PeftModel.from_pretrained"
# A scale that is baked in rounds B once, and the response to an input adds roundings of its type.
_ROUNDINGS = 4

Judge = Callable[[Mapping[str, Site]], float | None]
"""Judges the sites that PEFT loaded, by name; returns the error of the change if it is not 0."""


def check_adapter(
    job: ExportJob,
    folder: Path,
    judge: Judge,
    *,
    is_exact: bool = True,
    max_lora_rank: int | None = None,
) -> None:
    """Load an adapter's folder as its consumer does, judge it, and write its report.

    Args:
        job: The export.
        folder: What was written.
        judge: Judges each site's change.
        is_exact: Whether outputs must be the live model's; else their error is told alone.
        max_lora_rank: For the report.

    Raises:
        ExportError: The file is not the live adapter.
    """
    with as_exported(job.model, job.adapter_name):
        probe = probe_model(job.model.get_base_model(), job.options.inputs)
        base = copy_base(job.model)
        untouched = outputs_of(base, probe.inputs) if isinstance(probe, Probe) else ()
        loaded = _load(base, folder)
        sites = {site.name: site for site in find_sites(loaded)}
        change_error = judge(sites)
        limit = tolerance(job.model, loaded)
        found = outputs_of(base, probe.inputs) if isinstance(probe, Probe) else ()
    write_report(
        folder,
        make_report(
            job,
            folder,
            probe,
            found,
            untouched,
            checked_by=LOADER,
            limit=limit if is_exact else None,
            largest_rank=max(site.rank for site in sites.values()),
            change_error=change_error,
            max_lora_rank=max_lora_rank,
        ),
    )


def _load(base: nn.Module, folder: Path) -> PeftModel:
    try:
        with without_repeated_notes():
            loaded = PeftModel.from_pretrained(base, folder)
    except (LookupError, RuntimeError, TypeError, ValueError) as error:
        raise ExportError(
            f"{LOADER} cannot load what was written: {error!r}; nothing is left of it"
        ) from error
    evaluate(loaded)
    return loaded


def make_report(
    job: ExportJob,
    folder: Path,
    probe: Probe | Unprobed,
    found: tuple[Tensor, ...],
    untouched: tuple[Tensor, ...],
    *,
    checked_by: str,
    limit: float | None,
    largest_rank: int | None = None,
    change_error: float | None = None,
    max_lora_rank: int | None = None,
) -> ExportReport:
    """Compare outputs and put the report of an export together.

    Args:
        job: The export.
        folder: What was written.
        probe: The live model's outputs, or why there are none.
        found: Outputs of what was loaded.
        untouched: Outputs of the base model.
        checked_by: The loader.
        limit: Relative error that is tolerated; None for any.
        largest_rank: For the report.
        change_error: For the report.
        max_lora_rank: For the report.

    Raises:
        ExportError: The outputs differ by more than is tolerated.
    """
    parameters, size = measure_files(folder)
    difference = effect = None
    if isinstance(probe, Probe):
        difference = compare(probe.outputs, found)
        effect = compare(probe.outputs, untouched).absolute
        if limit is not None and not difference.relative <= limit:
            raise ExportError(
                f"what {checked_by} loads differs from the live model by {difference.relative:.2g} "
                f"of the largest output, and rounding explains {limit:g} (the adapter itself "
                f"changes outputs by {effect:.2g}, the error is {difference.absolute:.2g}); "
                "nothing was written. If the adapter works in training, please report this"
            )
    return ExportReport(
        format=job.format.name,
        rankflow=version("rankflow"),
        loads_in=job.format.loads_in,
        fails_in=job.format.fails_in,
        checked_by=checked_by,
        parameters=parameters,
        bytes=size,
        largest_rank=largest_rank,
        probe=probe.said if isinstance(probe, Probe) else None,
        not_probed=probe.reason if isinstance(probe, Unprobed) else None,
        absolute_error=None if difference is None else difference.absolute,
        relative_error=None if difference is None else difference.relative,
        tolerance=None if difference is None else limit,
        adapter_effect=effect,
        change_error=change_error,
        max_lora_rank=max_lora_rank,
        tokenizer=(folder / TOKENIZER).is_file(),
    )


def judge_exact(job: ExportJob) -> Judge:
    """Return a judge that wants each site's change and magnitude to be the live one's.

    The output of a whole model hides the change of a small adapter below its own rounding. Here
    each site's change acts on a random input, in float64.
    """

    def judge(loaded: Mapping[str, Site]) -> None:
        live = {site.name: site for site in job.sites}
        unknown = sorted(loaded.keys() - live.keys())
        if unknown:
            raise ExportError(
                f"PEFT puts the adapter on {unknown[0]!r} too, which is no site of it"
            )
        for name, site in live.items():
            _check_site(site, loaded.get(name))

    return judge


def _check_site(live: Site, loaded: Site | None) -> None:
    if loaded is None:
        if live.rank > 0 or live.magnitude is not None:
            raise ExportError(f"PEFT loads nothing at site {live.name!r}, which is not dead")
        return
    x = torch.randn(
        live.in_features,
        generator=torch.Generator().manual_seed(SEED),
        dtype=torch.float64,
    )
    error = (_respond(live, x) - _respond(loaded, x)).norm()
    digit = max(torch.finfo(site.A.dtype).eps for site in (live, loaded))
    if not error <= _ROUNDINGS * digit * _largest_response(live, x):
        raise ExportError(
            f"the change that PEFT loads at site {live.name!r} is not the live one: its response "
            f"to a random input is off by {error:.2g} of {_respond(live, x).norm():.2g}"
        )
    wanted, found = live.magnitude, loaded.magnitude
    if wanted is not None and (found is None or not torch.equal(wanted.to(found), found)):
        raise ExportError(
            f"the magnitude that PEFT loads at site {live.name!r} is not the live one"
        )


@torch.no_grad()
def _respond(site: Site, x: Tensor) -> Tensor:
    """Return ``s B A x``, shape ``(out,)``."""
    A, B = _factors(site)
    return site.scale * (B @ (A @ x))


@torch.no_grad()
def _largest_response(site: Site, x: Tensor) -> Tensor:
    """Return the norm that the response would have if no two terms of it cancelled."""
    A, B = _factors(site)
    return (abs(site.scale) * (B.abs() @ (A.abs() @ x.abs()))).norm()


def _factors(site: Site) -> tuple[Tensor, Tensor]:
    A, B = site.A.detach(), site.effective_B.detach()
    return A.flatten(1).cpu().double(), B.flatten(1).cpu().double()
