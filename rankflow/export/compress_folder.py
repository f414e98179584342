"""Compress a saved adapter of any origin; LoRA's needs no base model, DoRA's its weights alone."""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankflow.adapters.stock import check_base, exactly, plain_alpha
from rankflow.errors import BudgetError, ExportError, RankFlowError, SiteError
from rankflow.export.adapter_files import read_lora_config
from rankflow.export.compression import Compression, Request
from rankflow.export.decide import Adapter, Decision, Remainder, decide
from rankflow.export.decompose import AdaptedMatrix, Decomposition
from rankflow.export.inspect import CONFIG, AdapterSummary, SiteSummary, inspect_adapter
from rankflow.export.tensors import load_tensors
from rankflow.export.tokenizer import find_tokenizer
from rankflow.export.write import About, peft_layout, write_adapter
from rankflow.records import FloatArray, SiteInfo, SiteKind
from rankflow.specs.budget import BudgetSpec

Scores = Callable[[Mapping[str, Decomposition]], Mapping[str, FloatArray]]
"""From the components of every site to what each is worth to a loss, by site name."""

_PREFIX: Final = "base_model.model."
_PARTS: Final = {"A", "B", "embedding_A", "embedding_B", "magnitude_vector"}


def _unknown() -> int:
    raise BudgetError(
        "fraction counts the base model's parameters, and nothing tells them; give rank, params or "
        "bytes"
    )


@dataclass(frozen=True, slots=True)
class BaseReader:
    """What may be asked about the base model of a saved adapter.

    Attributes:
        rows: From names of sites to their weights, ``(out, in)``; asked for those of DoRA sites.
        parameters: Counts its parameters; asked for a budget that is a share of them.
        scores: Scores components by a loss; None to choose them by their energy.
    """

    rows: Callable[[Sequence[str]], Mapping[str, Tensor]]
    parameters: Callable[[], int] = _unknown
    scores: Scores | None = None


@dataclass(frozen=True, slots=True)
class _Saved:
    """One site as it is saved.

    Attributes:
        summary: Its scale and rank.
        a, b, m: Keys of its tensors; ``m`` is None for LoRA.
        A, B: The factors, in the shapes in which they are saved.
        magnitude: The magnitude.
    """

    summary: SiteSummary
    a: str
    b: str
    m: str | None
    A: Tensor
    B: Tensor
    magnitude: Tensor | None

    @property
    def matrix(self) -> AdaptedMatrix:
        A, B = self.A.flatten(1), self.B.flatten(1)
        return AdaptedMatrix(self.summary.name, A, B, self.summary.scale, self.magnitude)

    @property
    def kind(self) -> SiteKind:
        if "lora_embedding_A" in self.a:
            return "embedding"
        return "conv" if self.A.ndim > 2 else "linear"

    def describe(self, min_rank: int, max_rank: int | None) -> SiteInfo:
        out, width = self.B.shape[0], math.prod(self.A.shape[1:])
        largest = min(out, width)
        return SiteInfo(
            name=self.summary.name,
            kind=self.kind,
            in_features=width,
            out_features=out,
            has_magnitude=self.magnitude is not None,
            min_rank=min(min_rank, largest),
            max_rank=largest if max_rank is None else min(max_rank, largest),
        )


def compress_folder(
    source: Path,
    output: Path,
    budget: BudgetSpec | int | None = None,
    *,
    error: float | None = None,
    base: BaseReader,
) -> Compression:
    """Write a compressed copy of a saved adapter, wholly or not at all.

    What it counts of a budget, and how it chooses, is what ``rankflow.compress`` does.

    Args:
        source: The adapter's folder.
        output: The folder to write.
        budget: What may be left: a budget spec, or a number of parameters.
        error: Instead of a budget, the largest relative error allowed.
        base: Reads the base model.

    Raises:
        SpecError: Not exactly one of ``budget`` and ``error``, or magnitudes that a calibration
            cannot fold.
        BudgetError: The request cannot be met.
        ExportError: The adapter cannot be compressed, or the output cannot be written.
        RankFlowError: The adapter is missing, damaged or of another kind.
    """
    request = Request(budget, error, is_calibrated=base.scores is not None)
    if source.resolve() == output.resolve():
        raise ExportError(f"{output} is the adapter itself; write the compressed one elsewhere")
    summary = inspect_adapter(source)
    config = read_lora_config(source)
    _check_config(config, source)
    tensors = load_tensors(source)
    sites = tuple(_find(site, tensors) for site in summary.sites)
    names = [site.summary.name for site in sites]
    score = None if base.scores is None else partial(_score, base.scores, names)
    decision = decide(_describe_adapter(sites, summary, request, base), request, score)
    _write(output, summary, config, tensors, sites, decision, find_tokenizer(source))
    return decision.record


def _check_config(config: Mapping[str, Any], source: Path) -> None:
    try:
        check_base(config.get("init_lora_weights"), config.get("bias", "none"), source.name)
    except SiteError as error:
        raise ExportError(str(error)) from error
    for key in ("lora_bias", "target_parameters", "alora_invocation_tokens", "layer_replication"):
        if config.get(key):
            raise ExportError(
                f"{source / CONFIG} has {key} = {config[key]!r}, and such an adapter is not a sum "
                "of rank-1 components on layers of their own"
            )


def _find(site: SiteSummary, tensors: Mapping[str, Tensor]) -> _Saved:
    """Find the tensors of a site among those of the adapter."""
    pattern = re.compile(
        rf"(?:{re.escape(_PREFIX)})?{re.escape(site.name)}\.lora_(.+?)(?:\.weight)?"
    )
    keys = {match[1]: key for key in tensors if (match := pattern.fullmatch(key))}
    a = keys.get("A") or keys.get("embedding_A")
    b = keys.get("B") or keys.get("embedding_B")
    if a is None or b is None or keys.keys() - _PARTS:
        raise ExportError(
            f"site {site.name!r} has the tensors {sorted(keys)}; expected A and B, and no more "
            "than a magnitude beside"
        )
    A, B, m = tensors[a], tensors[b], keys.get("magnitude_vector")
    if A.shape[0] != B.shape[1] or site.rank != site.config_rank:
        raise ExportError(
            f"site {site.name!r} has A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)}, "
            f"and rank {site.config_rank} in its {CONFIG}; PEFT could not load it either"
        )
    return _Saved(site, a, b, m, A, B, None if m is None else tensors[m])


def _describe_adapter(
    sites: Sequence[_Saved], summary: AdapterSummary, request: Request, base: BaseReader
) -> Adapter:
    with_magnitude = [site.summary.name for site in sites if site.magnitude is not None]
    weights = cache(lambda: base.rows(with_magnitude))
    return Adapter(
        sites=tuple(site.describe(*request.bounds_of(site.summary.name)) for site in sites),
        matrices=tuple(site.matrix for site in sites),
        weight_of=lambda name: weights()[name],
        parameters=summary.parameters,
        base_parameters=base.parameters,
        bytes_per_parameter=sites[0].A.element_size(),
    )


def _score(
    scores: Scores, names: Sequence[str], parts: Sequence[Decomposition]
) -> list[FloatArray]:
    found = scores(dict(zip(names, parts, strict=True)))
    return [found[name] for name in names]


def _write(
    output: Path,
    summary: AdapterSummary,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    sites: Sequence[_Saved],
    decision: Decision,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    written = {k: t for k, t in tensors.items() if not any(k in (s.a, s.b, s.m) for s in sites)}
    scales = {}
    for site, left in zip(sites, decision.remainders(), strict=True):
        own = _rebuild(site, left)
        if own:
            scales[site.summary.name] = (site.summary.scale, own[site.a].shape[0])
            written |= own
    if not scales:
        raise RankFlowError("nothing is left of the adapter; raise the budget")
    changed = _describe(config, scales, is_dora=any(decision.record.magnitudes.values()))
    write_adapter(
        output,
        written,
        layout=peft_layout(
            lambda folder: (folder / CONFIG).write_text(
                json.dumps(changed, indent=2, sort_keys=True) + "\n", encoding="utf-8"
            )
        ),
        about=About(
            ranks=decision.record.ranks,
            trained=decision.record.parameters,
            base_model=summary.base_model,
            facts=None,
            classes=summary.classes,
            tokenizer=tokenizer,
        ),
    )


def _rebuild(site: _Saved, left: Remainder) -> dict[str, Tensor]:
    """Return the site's tensors as they are saved; none for a site with nothing left."""
    A, B, magnitude = left.A, left.B, left.magnitude
    if len(A) == 0:
        if magnitude is None:
            return {}
        A, B = A.new_zeros(1, A.shape[1]), B.new_zeros(len(B), 1)  # PEFT has no rank 0
    named = {
        site.a: A.to(site.A.dtype).reshape(len(A), *site.A.shape[1:]),
        site.b: B.to(site.B.dtype).reshape(len(B), len(A), *site.B.shape[2:]),
    }
    if magnitude is not None and site.m is not None and site.magnitude is not None:
        named[site.m] = magnitude.to(site.magnitude.dtype).view(site.magnitude.shape)
    return named


def _describe(
    config: Mapping[str, Any], scales: Mapping[str, tuple[float, int]], *, is_dora: bool
) -> dict[str, Any]:
    """Return PEFT's configuration of the adapter with these scales and ranks, site by site."""
    ranks = {exactly(site): rank for site, (_, rank) in scales.items()}
    alphas = {exactly(site): plain_alpha(scale * rank) for site, (scale, rank) in scales.items()}
    return {
        **config,
        "r": max(ranks.values()),
        "lora_alpha": max(alphas.values()),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        # A regex matches whole names; a list would also match what ends like one of them.
        "target_modules": "|".join(re.escape(site) for site in scales),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": is_dora,
    }
