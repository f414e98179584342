"""What one more component would be worth at a site that cannot be asked."""

import numpy as np

from rankflow.records import BoolArray, FloatArray, IntArray


def estimate_demand(
    ranks: IntArray, scores: FloatArray, mature: BoolArray, remembered: FloatArray
) -> FloatArray:
    """Estimate the score of one more component at each site: that of its weakest mature one.

    Returns diminish: while even the weakest component of a site earns much, another one will earn
    something of that order; as soon as one earns little, the site is saturated. A site whose
    components are all young has still to show, and promises nothing. A dead site promises what its
    weakest earned when it was last seen.

    Args:
        ranks: Live components of each site, shape ``(S,)``.
        scores: Their scores, shape ``(C,)``.
        mature: Which of them have lived long enough to be judged, shape ``(C,)``.
        remembered: The estimates at the event before, shape ``(S,)``.

    Returns:
        Estimated scores, shape ``(S,)``.

    >>> estimate_demand(
    ...     np.array([2, 1, 0]),
    ...     np.array([5.0, 3.0, 4.0]),
    ...     np.array([True, True, False]),
    ...     np.array([9.0, 9.0, 0.5]),
    ... )
    array([3. , 0. , 0.5])
    """
    site_index = np.repeat(np.arange(len(ranks)), ranks)
    weakest = np.full(len(ranks), np.inf)
    np.minimum.at(weakest, site_index[mature], scores[mature])
    young = np.bincount(site_index[~mature], minlength=len(ranks)) > 0
    promise = np.where(ranks == 0, remembered, weakest)
    return np.where(young, 0.0, promise)
