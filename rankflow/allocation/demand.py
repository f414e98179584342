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


def price_by_gradient(demand: FloatArray, ranks: IntArray, energy: FloatArray) -> FloatArray:
    """Let the gradient say what a site may promise.

    A site promises no more than its gradient, priced at the median of all sites, pays for: where
    the live components have learned what there is, little gradient is left outside of what they
    span, though each of them still earns much. A dead site of which nothing is remembered, say one
    that began without components, promises what its gradient pays for.

    Args:
        demand: Estimated score of one more component, shape ``(S,)``; 0 where nothing is known.
        ranks: Live components of each site, shape ``(S,)``.
        energy: Largest singular value of the gradient of each site's weight outside of what its
            components span, shape ``(S,)``; 0 where it was not measured.

    Returns:
        Estimated scores, shape ``(S,)``.

    >>> demand, energy = np.array([4.0, 6.0, 1.0, 0.0]), np.array([2.0, 1.0, 0.5, 3.0])
    >>> price_by_gradient(demand, np.array([2, 3, 1, 0]), energy)
    array([4., 2., 1., 6.])
    """
    judged = (demand > 0) & (energy > 0)
    if not judged.any():
        return demand
    paid = np.median(demand[judged] / energy[judged]) * energy
    unseen = (ranks == 0) & (demand == 0)
    return np.where(unseen, paid, np.where(energy > 0, np.minimum(demand, paid), demand))
