"""Every format that an adapter can be exported to, and those that would be silently wrong.

No torch in here: the command line names and refuses formats at once.
"""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from rankflow.errors import ExportError


@dataclass(frozen=True, slots=True)
class Format:
    """One way to write an adapter.

    Attributes:
        name: What the user asks for.
        writes: What the folder holds.
        loads_in: Programs that compute the same from it; only the first has checked it.
        fails_in: Programs that refuse it or read it wrongly, with the reason.
        options: Names of the ``ExportOptions`` that it heeds, besides ``inputs``.
        home: Module and function that writes it.
    """

    name: str
    writes: str
    loads_in: tuple[str, ...]
    fails_in: tuple[str, ...]
    options: frozenset[str]
    home: tuple[str, str]


_SERVERS: Final = "vLLM, SGLang, LoRAX, TGI: they ignore or refuse rank patterns and DoRA"

FORMATS: Final = {
    one.name: one
    for one in (
        Format(
            name="peft",
            writes="the adapter, exact, each site at its own rank",
            loads_in=("peft", "transformers (load_adapter)", "diffusers"),
            fails_in=(_SERVERS,),
            options=frozenset({"tokenizer"}),
            home=("rankflow.export.peft", "write_peft"),
        ),
        Format(
            name="peft-uniform",
            writes="a LoRA adapter of one rank, zero-padded, with the scale baked in",
            loads_in=("peft", "vLLM", "SGLang", "LoRAX", "llama.cpp (by its converter)"),
            fails_in=(),
            options=frozenset({"rank", "tokenizer"}),
            home=("rankflow.export.uniform", "write_uniform"),
        ),
        Format(
            name="merged",
            writes="the whole model with the adapter merged into its weights",
            loads_in=("transformers", "everything that loads the base model"),
            fails_in=(),
            options=frozenset({"dtype", "max_shard_size", "tokenizer"}),
            home=("rankflow.export.merged", "write_merged"),
        ),
        Format(
            name="lora-svd",
            writes="plain LoRA that approximates the change which DoRA makes",
            loads_in=("peft", "transformers (load_adapter)", "diffusers"),
            fails_in=(
                "vLLM, SGLang, LoRAX, TGI: they ignore or refuse rank patterns; export this folder "
                "again as peft-uniform",
            ),
            options=frozenset({"rank", "max_error", "tokenizer"}),
            home=("rankflow.export.lora_svd", "write_lora_svd"),
        ),
    )
}

_DORA_SCALE: Final = (
    "its loaders read `dora_scale` as one factor for each input, and PEFT's magnitude is one for "
    "each output, so that a DoRA adapter would load without an error and compute something else; "
    "use merged, or lora-svd and the program's own converter"
)
_ONE_RANK: Final = "it wants one rank at every site and no DoRA; use peft-uniform, or merged"

REFUSED: Final = {
    "comfyui": _DORA_SCALE,
    "kohya": _DORA_SCALE,
    "kohya-dora": _DORA_SCALE,
    "convert_to_lora": (
        "PEFT's own convert_to_lora drops DoRA's magnitudes without a word; use lora-svd, which "
        "measures what is lost"
    ),
    "vllm": _ONE_RANK,
    "sglang": _ONE_RANK,
    "lorax": _ONE_RANK,
    "tgi": _ONE_RANK,
    "gguf": (
        "llama.cpp scales by alpha over the tensor's rank and knows no DoRA; use peft-uniform or "
        "merged, and llama.cpp's converter"
    ),
}


def find_format(name: str) -> Format:
    """Return the format of that name.

    Raises:
        ExportError: There is none, or it would be silently wrong; the message says why.

    >>> find_format("merged").loads_in[0]
    'transformers'
    """
    if name in FORMATS:
        return FORMATS[name]
    if name.lower() in REFUSED:
        raise ExportError(f"format {name!r} is not written: {REFUSED[name.lower()]}")
    close = get_close_matches(name, FORMATS, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else ""
    raise ExportError(f"there is no format {name!r}, only {', '.join(FORMATS)}{guess}")
