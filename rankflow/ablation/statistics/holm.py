"""Holm's correction for several comparisons."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rankflow.errors import RankFlowError


def holm(p_values: Sequence[float]) -> NDArray[np.float64]:
    r"""Return step-down adjusted p-values, which bound the chance of any false claim.

    .. math:: \tilde p_{(i)} = \min\Bigl(1, \max_{j \le i} (m - j + 1)\, p_{(j)}\Bigr)

    It holds whatever the dependence, so comparisons may share a reference.

    Args:
        p_values: One for each of the ``m`` comparisons declared.

    Returns:
        Adjusted p-values ``(m,)`` in the order given.

    Raises:
        RankFlowError: If one is not within 0 and 1.

    References:
        Holm, Scand. J. Statist. 6 (1979).

    >>> holm([0.01, 0.04, 0.03, 0.005]).round(3).tolist()
    [0.03, 0.06, 0.06, 0.02]
    """
    p = np.asarray(p_values, dtype=np.float64)
    if not ((p >= 0) & (p <= 1)).all():
        raise RankFlowError(f"p-values must lie between 0 and 1, got {p.tolist()}")
    order = np.argsort(p, kind="stable")
    factors = np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted
