r"""How far fine-tuning moved a weight, told apart in magnitude and direction.

A row of a linear layer's weight is what one output neuron reads: its norm is the neuron's
magnitude, its unit vector the neuron's direction. Between the pretrained weight and the one of
step t the two move by

.. math::
    \Delta M_t = \frac{1}{k} \sum_n |m_{n,t} - m_{n,0}|, \qquad
    \Delta D_t = \frac{1}{k} \sum_n (1 - \cos(V_{n,t}, W_{n,0})).

The paper writes W as (in, out) and speaks of its columns; PyTorch stores (out, in), so that these
are the rows here, as in PEFT's DoRA.

Reference: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, section 3, equations 3
and 4, https://arxiv.org/abs/2402.09353.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

_BLOCK = 2**22  # numbers that are held in float64 at a time
# A weight merged in float32 differs by this much, relatively, though its adapter does nothing.
_ROUNDING = 1e-6
_CLOSE = 1e-3


@dataclass(frozen=True, slots=True)
class Change:
    """How far a weight moved.

    Attributes:
        dM: Mean absolute change of the rows' norms.
        dD: Mean of one minus the cosine between each row and its pretrained self, from 0 to 2;
            None where every row is zero before or after, since zero has no direction.
        norm: Mean norm of the pretrained rows, the unit to judge ``dM`` by.
        zero_rows: Rows that are zero before or after; they count in ``dM`` and not in ``dD``.
    """

    dM: float
    dD: float | None
    norm: float
    zero_rows: int = 0

    @property
    def is_nothing(self) -> bool:
        """Whether the weight is as it was."""
        return self.dM == 0 and not self.dD

    def beyond_rounding(self) -> "Change":
        """Return the change with zeros for what the rounding of float32 explains."""
        return replace(
            self,
            dM=self.dM if self.dM > _ROUNDING * self.norm else 0.0,
            dD=0.0 if self.dD is not None and self.dD <= _ROUNDING**2 else self.dD,
        )

    def is_close_to(self, other: "Change") -> bool:
        """Whether two changes of one weight differ by less than a thousandth."""
        return math.isclose(self.dM, other.dM, rel_tol=_CLOSE) and math.isclose(
            self.dD or 0.0, other.dD or 0.0, rel_tol=_CLOSE
        )


def magnitude_direction_change(before: npt.NDArray[Any], after: npt.NDArray[Any]) -> Change:
    """Compare a weight with its pretrained self, in float64.

    Scaling a row changes its magnitude alone; turning it changes its direction alone.

    Args:
        before: The pretrained weight, shape ``(out_features, in_features)``, of any float type.
        after: The fine-tuned weight, of the same shape; an adapter's merged into it.

    Raises:
        ValueError: The two are not matrices of one shape.

    >>> W = np.array([[3.0, 4.0], [0.0, 2.0]])
    >>> magnitude_direction_change(W, 2 * W)
    Change(dM=3.5, dD=0.0, norm=3.5, zero_rows=0)
    >>> magnitude_direction_change(W, W[:, ::-1] * [1, -1]).dM  # a quarter turn
    0.0
    """
    if before.ndim != 2 or before.shape != after.shape:
        raise ValueError(f"two matrices of one shape are needed, got {before.shape, after.shape}")
    rows = max(_BLOCK // max(before.shape[1], 1), 1)
    parts = [
        _compare_rows(before[start : start + rows], after[start : start + rows])
        for start in range(0, len(before), rows)
    ]
    old, new, turned = (np.concatenate(part) for part in zip(*parts, strict=True))
    has_direction = ~np.isnan(turned)
    return Change(
        dM=float(np.abs(new - old).mean()),
        dD=float(turned[has_direction].mean()) if has_direction.any() else None,
        norm=float(old.mean()),
        zero_rows=int((~has_direction).sum()),
    )


def _compare_rows(
    before: npt.NDArray[Any], after: npt.NDArray[Any]
) -> tuple[npt.NDArray[np.float64], ...]:
    """Return the norms before and after, and one minus the cosine; nan where a row is zero.

    ``1 - cos(a, b) = |a/|a| - b/|b||^2 / 2``, which keeps its digits where the angle is small.
    """
    before, after = before.astype(np.float64), after.astype(np.float64)
    old, new = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
    with np.errstate(invalid="ignore"):
        apart = after / new[:, None] - before / old[:, None]
    return old, new, np.square(apart).sum(axis=1) / 2
