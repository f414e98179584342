"""Numbers that sum up an event."""

import math
from collections.abc import Iterable, Mapping


def rank_entropy(ranks: Iterable[int]) -> float:
    r"""Return how evenly the components are spread over the sites.

    .. math:: H = -\frac{1}{\log S} \sum_s p_s \log p_s, \qquad p_s = r_s / \sum_t r_t

    Args:
        ranks: Rank ``r_s`` of each of the S sites.

    Returns:
        From 0 (all components at one site, or none anywhere) to 1 (the same rank everywhere,
        a single live site included).

    >>> rank_entropy([4, 4, 4, 4]), rank_entropy([8, 0]), rank_entropy([0, 0])
    (1.0, 0.0, 0.0)
    >>> round(rank_entropy([6, 2]), 3)
    0.811
    """
    ranks = list(ranks)
    total = sum(ranks)
    if total == 0:
        return 0.0
    if len(ranks) == 1:
        return 1.0
    shares = [rank / total for rank in ranks if rank > 0]
    entropy = sum(share * math.log(1 / share) for share in shares) / math.log(len(ranks))
    return min(entropy, 1.0)  # rounding may pass 1 where all ranks are equal


def churn(components: int, pruned: int, born: int) -> float:
    """Return the share of the components that an event changed.

    It is the Dice distance of the sets of components before and after:
    ``(pruned + born) / (before + after)`` with ``after = before - pruned + born``.

    Args:
        components: Live components before the event, over all sites.
        pruned: Components that it removed.
        born: Components that it added.

    Returns:
        From 0 (none changed) to 1 (none stayed).

    >>> churn(100, pruned=10, born=10), churn(100, pruned=0, born=0), churn(8, pruned=8, born=8)
    (0.1, 0.0, 1.0)
    """
    changed = pruned + born
    return changed / (2 * components - pruned + born) if changed else 0.0


def mean_score(importance: Mapping[str, float], ranks: Mapping[str, int]) -> float:
    """Return the mean score of a component.

    Args:
        importance: Sum of the scores of each site's components, by site name.
        ranks: Rank of each site when the scores were taken, by site name.

    Returns:
        The mean over all components; 0 where there is none.

    >>> mean_score({"q": 3.0, "v": 1.0}, {"q": 6, "v": 2})
    0.5
    """
    components = sum(ranks.values())
    return sum(importance.values()) / components if components else 0.0


def per_parameter(importance: Mapping[str, float], costs: Mapping[str, int]) -> dict[str, float]:
    """Return each site's importance per trainable parameter.

    Args:
        importance: Sum of the scores of each site's components, by site name.
        costs: Trainable parameters of each site when the scores were taken, by site name.

    Returns:
        By site name; a site without parameters earns 0.

    >>> per_parameter({"q": 3.0, "v": 0.0}, {"q": 600, "v": 0})
    {'q': 0.005, 'v': 0.0}
    """
    return {site: worth / costs[site] if costs[site] else 0.0 for site, worth in importance.items()}
