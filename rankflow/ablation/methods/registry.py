"""All methods that an ablation can name."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Final, cast

from rankflow.ablation.methods.adalora import AdaloraMethod
from rankflow.ablation.methods.bitfit import BitFit
from rankflow.ablation.methods.boft import BoftMethod
from rankflow.ablation.methods.bottleneck import BottleneckAdapters
from rankflow.ablation.methods.full import FullFineTuning
from rankflow.ablation.methods.method import Method
from rankflow.ablation.methods.peft_tuners import TUNERS
from rankflow.ablation.methods.prompts import PROMPTS
from rankflow.ablation.methods.steered import Steered
from rankflow.errors import SpecError
from rankflow.specs.ablation import AblationSpec, MethodSpec
from rankflow.specs.reading import Fault, raise_faults, suggest

LORA: Final = "LoRA, arXiv 2106.09685"
DORA: Final = "weight-decomposed DoRA, arXiv 2402.09353"
OURS: Final = "RankFlow"

_PLAIN: Final[Mapping[str, Steered]] = {
    "lora": Steered("PEFT's LoRA, one rank everywhere", LORA),
    "rslora": Steered(
        "PEFT's LoRA with the scale alpha / sqrt(rank)",
        "rsLoRA, arXiv 2312.03732",
        rank_stabilised=True,
        rate=2e-3,
    ),
    "dora": Steered("PEFT's DoRA, one rank everywhere", DORA, use_dora=True),
    "qlora": Steered("LoRA over a base in 4 bits", "QLoRA, arXiv 2305.14314", quantised=True),
    "qdora": Steered("DoRA over a base in 4 bits", DORA, use_dora=True, quantised=True),
}

_DYNAMIC: Final[Mapping[str, Steered]] = {
    "dvora": Steered(
        "DoRA's magnitude over VeRA: gates on random, frozen, shared rows",
        "VeRA, arXiv 2310.11454, and DoRA, arXiv 2402.09353",
        use_dora=True,
        rate=2e-2,
        rows=256,
    ),
    "dynamic-rank-dora": Steered(
        "gated components, pruned from 1.5x by their share in a layer",
        "Dynamic-Rank DoRA, arXiv 2405.17357",
        preset="dynamic-rank-dora",
        overrides={"every": 0.02},
    ),
    "hybrid": Steered(
        "DoRA whose components and magnitudes compete for one budget",
        OURS,
        preset="hybrid",
        use_dora=True,
    ),
}

_CONTROLS: Final[Mapping[str, Steered]] = {
    "lora-1.5x": Steered("control: LoRA with half as many parameters again", LORA, factor=1.5),
    "random-allocation": Steered(
        "control: the hybrid with ranks drawn at random",
        OURS,
        preset="hybrid",
        use_dora=True,
        overrides={"policy": "random", "recycle": 0.0},
    ),
    "frozen-pattern": Steered(
        "control: the ranks and magnitudes that the hybrid learned, trained from scratch",
        OURS,
        use_dora=True,
        overrides={"magnitude": "budgeted"},
        follows="hybrid",
    ),
    "svd-truncate": Steered(
        "control: LoRA trained at 1.5x, cut to the budget by SVD afterwards",
        LORA,
        factor=1.5,
        truncates=True,
    ),
}

METHODS: Final[Mapping[str, Method]] = {
    "full": FullFineTuning(),
    **_PLAIN,
    "adalora": AdaloraMethod(),
    **TUNERS,
    "boft": BoftMethod(),
    "adapter": BottleneckAdapters(),
    **PROMPTS,
    "bitfit": BitFit(),
    **_DYNAMIC,
    **_CONTROLS,
}
"""The rows by name; the first of them are the field's, then ours, then controls."""


def check_methods(spec: AblationSpec) -> None:
    """Check that all methods of an ablation are there, and can be varied as it declares.

    Raises:
        SpecError: One is not; all faults are listed.
    """
    faults = []
    for name in spec.methods:
        try:
            faults += _source_faults(spec, name)
        except SpecError as error:
            faults.append(Fault({"method": name}, str(error)))
    raise_faults(f"the methods of ablation '{spec.name}'", faults)


def find_method(variant: MethodSpec) -> Method:
    """Return the row that a spec names, varied as the spec declares.

    Raises:
        SpecError: There is no such row, or the variant asks for what the row does not have.
    """
    if variant.like not in METHODS:
        raise SpecError(
            f"no method is called '{variant.like}'; {suggest(variant.like, METHODS)} "
            "`rankflow ablate --list` names them all"
        )
    method = METHODS[variant.like]
    if isinstance(method, Steered):
        if variant.config:
            raise SpecError(
                f"config = {variant.config}: '{variant.like}' is steered by a budget; set budget, "
                "or the ablation's [adapter]"
            )
        return method.varied(variant)
    steered = variant.model_dump(include={"budget", "use_dora", "factor", "follows"})
    alien = {key: value for key, value in steered.items() if value not in (None, {})}
    if alien:
        raise SpecError(f"{alien}: '{variant.like}' has no RankFlow budget; set config instead")
    return (
        method
        if variant.rate is None
        else dataclasses.replace(cast(Any, method), rate=variant.rate)
    )


def _source_faults(spec: AblationSpec, name: str) -> list[Fault]:
    """Return what is wrong with the budget of a method, and with the runs that it retrains."""
    passed = [name]
    method = find_method(spec.variant(name))
    while isinstance(method, Steered):
        method.budget(parameters=2, seed=0)
        source = method.follows
        if source is None:
            break
        if source in passed:
            return [Fault({"method": name}, f"retrains its own ranks, by {' -> '.join(passed)}")]
        if source not in spec.methods:
            remedy = f"retrains the ranks of '{source}', which is not run; add it to methods"
            return [Fault({"method": passed[-1]}, remedy)]
        passed.append(source)
        method = find_method(spec.variant(source))
    return []
