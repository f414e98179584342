"""How many pairs a claim takes: what a test can reach at all, and what gives it a fair chance."""

import math
from bisect import bisect_left
from typing import Final

from scipy import special, stats

from rankflow.errors import RankFlowError

MOST_PAIRS: Final = 1_000_000
"""Beyond this many, an effect is out of reach."""


def smallest_p(pairs: int) -> float:
    """Return the smallest two-sided p-value that so many pairs can give, all agreeing.

    It is ``2 / 2^n``, for the sign-flip test and for Wilcoxon's signed-rank test alike: one pattern
    of signs and its opposite out of ``2^n``.

    Args:
        pairs: Number of pairs.

    >>> smallest_p(5), smallest_p(6)
    (0.0625, 0.03125)
    """
    return min(1.0, 2.0 ** (1 - pairs))


def can_reach(pairs: int, alpha: float = 0.05, *, comparisons: int = 1) -> bool:
    """Tell whether so many pairs can be significant at all.

    Args:
        pairs: Number of pairs.
        alpha: Level of the test.
        comparisons: Number ``m`` of comparisons; Holm may ask for ``alpha / m``.

    >>> can_reach(5), can_reach(6), can_reach(6, comparisons=2)
    (False, True, False)
    """
    return comparisons * smallest_p(pairs) <= alpha


def fewest_pairs(alpha: float = 0.05, *, comparisons: int = 1) -> int:
    """Return the smallest number of pairs that can reach the level; arguments as `can_reach`.

    >>> fewest_pairs(), fewest_pairs(comparisons=4)
    (6, 8)
    """
    check_level(alpha)
    pairs = 1
    while not can_reach(pairs, alpha, comparisons=comparisons):
        pairs += 1
    return pairs


def paired_power(effect: float, pairs: int, alpha: float = 0.05) -> float:
    """Return the power of the two-sided paired t test, which the sign-flip test's comes close to.

    It comes from scipy.stats' noncentral F distribution of ``t^2``, which is NaN only without an
    effect; its noncentral t, and scipy.special's F, are NaN for some large effects.

    Args:
        effect: True d_z; its sign does not matter.
        pairs: Number of pairs, at least 2.
        alpha: Level of the test.

    >>> round(paired_power(0.5, 34), 3)
    0.808
    """
    bar = special.stdtrit(pairs - 1, alpha / 2) ** 2
    shift = pairs * effect**2
    return float(stats.ncf.sf(bar, 1, pairs - 1, shift)) if shift else alpha


def pairs_needed(
    effect: float, alpha: float = 0.05, *, power: float = 0.8, comparisons: int = 1
) -> int | None:
    """Return how many pairs would find an effect of this size with the given power.

    The effect observed stands in for the true one, which it may miss by much with few pairs: the
    answer plans the next measurement, it does not judge the last.

    Args:
        effect: d_z.
        alpha: Level of the test.
        power: Chance of finding the effect.
        comparisons: Number ``m`` of comparisons; the level is ``alpha / m``, Holm's worst case.

    Returns:
        The number of pairs; None without an effect (0 or NaN), or with one so small that
        ``MOST_PAIRS`` would not do.

    Raises:
        RankFlowError: If the level or the power is not between 0 and 1.

    >>> pairs_needed(0.5), pairs_needed(0.5, comparisons=3), pairs_needed(0.0)
    (34, 45, None)
    """
    check_level(alpha)
    check_level(power)
    level = alpha / comparisons

    def enough(pairs: int) -> bool:
        return paired_power(effect, pairs, level) >= power

    fewest = fewest_pairs(alpha, comparisons=comparisons)
    if math.isinf(effect):
        return fewest
    if effect == 0 or math.isnan(effect) or not enough(MOST_PAIRS):
        return None
    # Power grows with the pairs.
    return fewest + bisect_left(range(fewest, MOST_PAIRS), True, key=enough)


def check_level(level: float) -> None:
    """Raise `RankFlowError` unless the probability lies strictly between 0 and 1."""
    if not 0 < level < 1:
        raise RankFlowError(
            f"a level or a power must lie strictly between 0 and 1, got {level}; 0.05 and 0.8 are "
            f"usual"
        )
