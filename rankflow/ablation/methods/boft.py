"""BOFT by PEFT, with its butterfly factors on every machine.

PEFT needs a compiled CUDA extension to lay blocks out as a block-diagonal matrix, and without one
it falls back, with a warning, to a single factor: that is OFT with trained output scales, and no
butterfly at all. Here the same two operations in plain torch stand in its place, so that what is
compared does not depend on the machine.

PEFT keeps a dense permutation of (factors, in, in) for every site and multiplies by it at every
step, which costs far more memory and time than the trained parameters suggest.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from peft import BOFTConfig
from peft.tuners.boft import layer as boft_layer
from torch import Tensor

from rankflow.ablation.methods.method import Built, Setting, UnsupportedError
from rankflow.ablation.methods.peft_tuners import (
    add_tuner,
    make_config,
    merge_copy,
    straight_targets,
)
from rankflow.training.models import BaseModel

_MOST_BYTES: Final = 8 * 2**30  # of PEFT's permutations


@dataclass(frozen=True, slots=True)
class BoftMethod:
    """BOFT; its size is the trained entries of the rotation per input feature.

    A rotation of ``factors`` butterfly factors with blocks of ``width`` trains ``factors * width``
    entries per input feature, which is what the budget decides; of the ways to have as many, the
    one with the fewest factors is taken, but never less than two. A scale per output is trained
    as well.
    """

    summary: str = "BOFT by PEFT: the inputs of every site rotated by butterfly factors"
    source: str = "arXiv 2311.06243"
    rate: float = 8e-3
    scalings: tuple[float, ...] = (1.0,)
    quantised: bool = False
    size_name: str = "entries per input"

    def sizes(self, base: BaseModel, setting: Setting) -> Sequence[int]:
        """Return the sizes to choose from.

        Raises:
            UnsupportedError: A site's inputs do not divide into blocks, a site is no ``nn.Linear``,
                or PEFT would need more memory for permutations than is reasonable.
        """
        widths = [target.inputs for target in straight_targets(base, setting).values()]
        needed = 2 * 4 * sum(width**2 for width in widths)
        if needed > _MOST_BYTES:
            raise UnsupportedError(
                f"PEFT's BOFT keeps dense permutations of {needed / 2**30:.0f} GiB for this model"
            )
        distinct = sorted(set(widths))
        sizes = [size for size in range(4, min(distinct) + 1) if butterfly(size, distinct)]
        if not sizes:
            raise UnsupportedError("the input widths of the sites do not divide into butterflies")
        return sizes

    def build(self, base: BaseModel, setting: Setting, size: int | None) -> Built:
        """Wrap the base model by PEFT.

        Raises:
            UnsupportedError: PEFT refuses the model.
        """
        assert size is not None
        targets = straight_targets(base, setting)
        shape = butterfly(size, sorted({target.inputs for target in targets.values()}))
        assert shape is not None
        factors, width = shape
        boft_layer._FBD_CUDA = _BlockDiagonal
        keywords = {
            "boft_block_size": width,
            "boft_n_butterfly_factor": factors,
            "target_modules": list(targets),
        }
        config = make_config(BOFTConfig, base, setting, keywords)
        model = add_tuner(base, config)
        return Built(model, merge=partial(merge_copy, model))


def butterfly(size: int, widths: Sequence[int]) -> tuple[int, int] | None:
    """Return the number of factors and the width of their blocks; None if there is no such shape.

    Args:
        size: Their product.
        widths: Input widths that all have to divide into such butterflies.

    >>> butterfly(8, [384, 1536])
    (2, 4)
    >>> butterfly(6, [384, 1536])
    (3, 2)
    >>> butterfly(7, [384, 1536]) is None
    True
    """
    for factors in range(2, size // 2 + 1):
        width, rest = divmod(size, factors)
        span = width * 2 ** (factors - 1)  # what the last factor mixes
        if not rest and width % 2 == 0 and all(inputs % span == 0 for inputs in widths):
            return factors, width
    return None


class _BlockDiagonal:
    """The two functions of PEFT's CUDA extension, in plain torch."""

    @staticmethod
    def forward(blocks: Tensor) -> list[Tensor]:
        """Lay blocks out, ``(factors, blocks, width, width)`` to ``(factors, in, in)``."""
        factors, count, width, _ = blocks.shape
        dense = blocks.new_zeros(factors, count, width, count, width)
        dense.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return [dense.view(factors, count * width, count * width)]

    @staticmethod
    def backward(gradient: Tensor, blocks: Tensor) -> list[Tensor]:
        """Read the blocks of a gradient of ``forward``'s result."""
        factors, count, width, _ = blocks.shape
        split = gradient.reshape(factors, count, width, count, width)
        return [split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()]
