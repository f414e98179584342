"""An event in a few numbers, for curves."""

from rankflow.records import RankEvent
from rankflow.report.statistics import churn, mean_score, rank_entropy


def event_scalars(event: RankEvent) -> dict[str, float]:
    """Return the numbers that reporters show of an event, by tag.

    ``rankflow/magnitudes``, the number of trained ones, is there if the budget covers them.

    >>> ranks = {"q": 3, "v": 1}
    >>> event = RankEvent(0, 120, 4096, 4096, 2048, ranks, ranks, {"q": 1.0, "v": 1.0}, (), (), 0.1)
    >>> scalars = event_scalars(event)
    >>> scalars["rankflow/spent"], scalars["rankflow/mean_score"], scalars["rankflow/churn"]
    (2048, 0.5, 0.0)
    """
    components = sum(event.ranks_before.values())
    pruned = sum(change.component is not None for change in event.pruned)
    born = sum(change.component is not None for change in event.born)
    scalars = {
        "rankflow/budget": event.limit,
        "rankflow/spent": event.spent,
        "rankflow/total_rank": sum(event.ranks.values()),
        "rankflow/rank_entropy": rank_entropy(event.ranks.values()),
        "rankflow/churn": churn(components, pruned, born),
        "rankflow/mean_score": mean_score(event.importance, event.ranks_before),
    }
    if event.magnitudes:
        scalars["rankflow/magnitudes"] = sum(event.magnitudes.values())
    return scalars
