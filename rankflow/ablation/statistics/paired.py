r"""The mean of paired differences, its standard error, and what follows from the two.

With ``T`` tasks and ``n_t`` pairs of task ``t`` the estimate is the mean of the tasks' means,

.. math:: \bar d = \frac{1}{T} \sum_t \bar d_t, \qquad
          \widehat{\mathrm{var}}(\bar d) = \frac{1}{T^2} \sum_t \frac{s_t^2}{n_t},

so a task counts the same however many of its pairs broke, and a difference between tasks is no
noise. The degrees of freedom are Welch's and Satterthwaite's. A task with a single pair has no
spread of its own: then all pairs make one stratum, in which differences between tasks do count as
noise, which errs towards "no difference".
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from rankflow.ablation.statistics.table import Pairs
from rankflow.errors import RankFlowError


def weights(pairs: Pairs) -> NDArray[np.float64]:
    """Return each pair's weight in the estimate, ``1 / (T n_t)``, as ``(n,)``."""
    _, task, counts = np.unique(pairs.task, return_inverse=True, return_counts=True)
    return 1.0 / (len(counts) * counts[task]) if len(pairs) else np.zeros(0)


def strata(pairs: Pairs) -> Sequence[NDArray[np.intp]]:
    """Return the indices of the pairs within which spread is noise: tasks, or all pairs."""
    _, task, counts = np.unique(pairs.task, return_inverse=True, return_counts=True)
    if counts.min(initial=2) < 2:
        return [np.arange(len(pairs))]
    return [np.flatnonzero(task == t) for t in range(len(counts))]


def mean(pairs: Pairs) -> float:
    """Return the mean of the tasks' mean differences; NaN without pairs."""
    return float(weights(pairs) @ pairs.difference) if len(pairs) else math.nan


def standard_error(pairs: Pairs) -> tuple[float, float]:
    """Return the standard error of the mean and its degrees of freedom.

    Returns:
        Both; NaN for fewer than two pairs. Differences that are all alike have no error.
    """
    if len(pairs) < 2:
        return math.nan, math.nan
    weight, groups = weights(pairs), strata(pairs)
    freedoms = np.array([len(group) - 1 for group in groups])
    parts = np.array([pairs.difference[g].var(ddof=1) * (weight[g] ** 2).sum() for g in groups])
    variance = parts.sum()
    if variance == 0:
        return 0.0, float(freedoms.sum())
    shares = parts / variance  # squares of tiny variances would underflow
    return math.sqrt(variance), float(1 / (shares**2 / freedoms).sum())


def effect_size(pairs: Pairs) -> float:
    """Return Cohen's d_z: the mean over the standard deviation of all differences.

    Differences between tasks count as spread here, as they do for the sign-flip test. It is the
    plain d_z, without Hedges' correction, so it is some per cent too large for ten pairs or fewer.

    Returns:
        Dimensionless, with the sign of the mean; 0 where all differences are 0, an infinity where
        they are alike but not 0, NaN for fewer than two pairs.
    """
    if len(pairs) < 2:
        return math.nan
    middle, spread = mean(pairs), pairs.difference.std(ddof=1)
    if spread > 0:
        return float(middle / spread)
    return math.copysign(math.inf, middle) if middle else 0.0


def equivalence_p(pairs: Pairs, margin: float) -> float:
    """Return the p-value of two one-sided t tests (TOST) that the mean lies within the margin.

    The null is a true difference of the margin or more, either way. The p-value is at most 0.05
    exactly where the 90% Student interval lies within the margin.

    Args:
        pairs: The differences.
        margin: Largest difference that does not matter, above 0, in the differences' unit: a log
            ratio of 0.01 is 1%.

    Returns:
        The larger of the two one-sided p-values; 1 for fewer than two pairs.

    Raises:
        RankFlowError: If the margin is not positive and finite.

    References:
        Schuirmann, J. Pharmacokinet. Biopharm. 15 (1987).
    """
    if not 0 < margin < math.inf:
        raise RankFlowError(
            f"the margin of equivalence must be positive and finite, got {margin}; give the "
            f"largest difference that does not matter"
        )
    error, freedom = standard_error(pairs)
    if math.isnan(error):
        return 1.0
    room = margin - abs(mean(pairs))
    if error == 0:
        return float(room <= 0)
    return float(stats.t.sf(room / error, freedom))
