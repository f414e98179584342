"""One line of text for an event."""

from rankflow.records import RankEvent


def describe_event(event: RankEvent) -> str:
    """Return what an event did, in one line for a log or a progress bar.

    >>> ranks = {"q": 3, "v": 0}
    >>> describe_event(RankEvent(0, 120, 4096, 2048, 1536, ranks, ranks, {}, (), (), 0.1))
    'step 120  budget 4,096 -> spent 1,536  ranks 0-3 (mean 1.5)  pruned 0, born 0'
    """
    ranks = event.ranks.values()
    on = event.magnitudes.values()
    magnitudes = f"magnitudes {sum(on):,} of {len(on):,}  " if on else ""
    return (
        f"step {event.step:,}  budget {event.limit:,} -> spent {event.spent:,}  "
        f"ranks {min(ranks)}-{max(ranks)} (mean {sum(ranks) / len(ranks):.1f})  {magnitudes}"
        f"pruned {len(event.pruned):,}, born {len(event.born):,}"
    )
