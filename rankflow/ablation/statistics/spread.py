"""The mean of one method's scores with its interval, for tables and curves."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from rankflow.ablation.statistics.power import check_level


@dataclass(frozen=True, slots=True)
class Spread:
    """A mean and Student's interval of it.

    Args:
        mean: Of the finite scores; NaN without any.
        low: Lower end of the interval; NaN for fewer than two finite scores.
        high: Upper end.
        n: Finite scores.
        broken: Scores that are not finite, and so are in neither the mean nor the interval.
    """

    mean: float
    low: float
    high: float
    n: int
    broken: int


def spread(scores: Sequence[float], *, level: float = 0.95) -> Spread:
    """Return the mean of one method's scores on one task, over seeds, with its interval.

    It shows how far a single method scatters. Whether two methods differ it cannot tell, because
    what seeds do to both does not cancel: that takes
    `rankflow.ablation.statistics.verdict.compare_all`.

    Args:
        scores: One for each seed.
        level: Confidence.

    Raises:
        RankFlowError: If the level is not between 0 and 1.

    >>> spread([0.5, 0.75, float("nan")])
    Spread(mean=0.625, low=-0.963..., high=2.213..., n=2, broken=1)
    """
    check_level(level)
    values = np.asarray(scores, dtype=np.float64)
    finite = values[np.isfinite(values)]
    middle = float(finite.mean()) if len(finite) else math.nan
    reach = math.nan
    if len(finite) >= 2:
        reach = float(stats.t.ppf((1 + level) / 2, len(finite) - 1) * stats.sem(finite))
    return Spread(middle, middle - reach, middle + reach, len(finite), len(values) - len(finite))
