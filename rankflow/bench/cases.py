"""The cases that are measured."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final

from rankflow.errors import RankFlowError


@dataclass(frozen=True)
class Case:
    """A model and a way to train it.

    Args:
        name: How to ask for it.
        shape: ``"llama"``, ``"minilm"`` or ``"nf4"``, one quantised layer.
        rank: Of all adapters.
        dtype: Type of the base model; adapters are float32.
        autocast: Whether the forward runs under autocast to bfloat16.
        dropout: Of the adapters' inputs.
        checkpointing: Whether activations are computed again in backward.
        tiny: Whether the model is too small to tell anything, but quick.
    """

    name: str
    shape: str = "llama"
    rank: int = 32
    dtype: str = "float32"
    autocast: bool = False
    dropout: float = 0.0
    checkpointing: bool = False
    tiny: bool = False


CASES: Final = (
    Case("llama-r32"),
    Case("llama-r8", rank=8),
    Case("llama-r32-dropout", dropout=0.05),
    Case("llama-r32-autocast", autocast=True),
    Case("llama-r32-bf16", dtype="bfloat16"),
    Case("llama-r32-bf16-checkpointing", dtype="bfloat16", checkpointing=True),
    Case("minilm-r32", shape="minilm"),
    Case("minilm-r8", shape="minilm", rank=8),
    Case("nf4-layer", shape="nf4"),
)


def choose_cases(
    names: Sequence[str] = (), *, dtype: str | None = None, tiny: bool = False
) -> tuple[Case, ...]:
    """Return the cases of these names, or all that can run here if there are none.

    Args:
        names: Names of cases.
        dtype: Only cases of this type, or None for all.
        tiny: Make their models tiny.

    Raises:
        RankFlowError: A name or type is unknown, or nothing is left.

    >>> [case.name for case in choose_cases(["minilm-r8", "llama-r8"])]
    ['minilm-r8', 'llama-r8']
    """
    by_name = {case.name: case for case in CASES}
    for name in names:
        if name not in by_name:
            near = difflib.get_close_matches(name, by_name, 1)
            hint = f"; did you mean {near[0]!r}" if near else ""
            raise RankFlowError(f"no case {name!r}{hint}; the cases are {', '.join(by_name)}")
    chosen = [by_name[name] for name in names] or [
        case for case in CASES if case.shape != "nf4" or find_spec("bitsandbytes")
    ]
    chosen = [case for case in chosen if dtype in (None, case.dtype)]
    if not chosen:
        raise RankFlowError(f"no case has the type {dtype!r}; try float32 or bfloat16")
    return tuple(replace(case, tiny=tiny) for case in chosen)
