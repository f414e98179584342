"""What can be asked of an export."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from rankflow.errors import ExportError
from rankflow.export.formats import FORMATS, Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIZE: Final = re.compile(r"\d+(\.\d+)? ?(KB|MB|GB|TB)", re.IGNORECASE)
DTYPES: Final = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """Options of an export; None is the format's own choice.

    Attributes:
        rank: ``peft-uniform``: the one rank, at least the largest. ``lora-svd``: a budget, the
            parameters of plain LoRA of this rank, shared where they help most.
        max_error: ``lora-svd``: largest relative error of the change in the Frobenius norm; 0.01
            by default.
        dtype: ``merged``: type of the weights, e.g. ``"bfloat16"``.
        max_shard_size: ``merged``: largest file, e.g. ``"5GB"``.
        tokenizer: Saved with what is written; for ``merged`` by default the one in the base
            model's own folder, if it has one.
        inputs: Keyword arguments of the model's forward on which outputs are compared, tensors or
            dicts of them; by default seeded ones, made from the model's configuration.
    """

    rank: int | None = None
    max_error: float | None = None
    dtype: str | None = None
    max_shard_size: str | None = None
    tokenizer: "PreTrainedTokenizerBase | None" = None
    inputs: Mapping[str, Any] | None = None

    def check(self, chosen: Format) -> None:
        """Refuse values out of range, and options that the format would ignore.

        Raises:
            ExportError: It is so.

        >>> ExportOptions(dtype="float16").check(FORMATS["merged"])
        """
        given = {f.name for f in fields(self) if getattr(self, f.name) is not None} - {"inputs"}
        for name in sorted(given - chosen.options):
            takers = [one.name for one in FORMATS.values() if name in one.options]
            raise ExportError(
                f"format {chosen.name!r} does not heed {name}; it belongs to {', '.join(takers)}"
            )
        if self.rank is not None and self.rank < 1:
            raise ExportError(f"rank is {self.rank}; it must be at least 1")
        if self.max_error is not None and not 0 < self.max_error < 1:
            raise ExportError(f"max_error is {self.max_error}; it is a share between 0 and 1")
        if self.max_shard_size is not None and not _SIZE.fullmatch(self.max_shard_size):
            raise ExportError(
                f"max_shard_size is {self.max_shard_size!r}; it must be a size such as 5GB or 200MB"
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ExportError(f"dtype is {self.dtype!r}; it must be one of {', '.join(DTYPES)}")
