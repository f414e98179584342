"""How two allocations of ranks differ, site by site."""

from collections.abc import Mapping
from dataclasses import dataclass

from rankflow.records import RankEvent


@dataclass(frozen=True, slots=True)
class Allocation:
    """Where the parameters of a run or of an adapter are.

    Attributes:
        ranks: Rank of each site, by site name.
        magnitudes: The sites that have a DoRA magnitude.
        parameters: Parameters of all sites.
        note: What a reader of these numbers should know; may be empty.
    """

    ranks: Mapping[str, int]
    magnitudes: frozenset[str]
    parameters: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """What the second allocation, B, has more or less than the first one, A.

    Attributes:
        ranks: Rank in B less the rank in A of each site of both, by site name.
        only_a: Ranks of the sites that only A has, by site name.
        only_b: Ranks of the sites that only B has, by site name.
        gained: The sites of both whose magnitude only B has.
        lost: The sites of both whose magnitude only A has.
    """

    ranks: Mapping[str, int]
    only_a: Mapping[str, int]
    only_b: Mapping[str, int]
    gained: frozenset[str]
    lost: frozenset[str]

    @property
    def sites(self) -> list[str]:
        """All sites, those of A first."""
        return [*self.ranks, *self.only_a, *self.only_b]

    @property
    def largest(self) -> int:
        """The largest difference of a rank, up or down; 1 if there is none."""
        return max([1, *map(abs, self.ranks.values())])


def signed(change: int) -> str:
    """Write a difference of ranks.

    >>> signed(2), signed(0), signed(-1)
    ('+2', '0', '-1')
    """
    return f"{change:+}" if change else "0"


def find_difference(a: Allocation, b: Allocation) -> Difference:
    """Compare two allocations.

    >>> a = Allocation({"q": 4, "v": 2}, frozenset({"q"}), 60)
    >>> b = Allocation({"q": 1, "k": 3}, frozenset(), 40)
    >>> found = find_difference(a, b)
    >>> found.ranks, found.only_a, found.only_b, found.lost
    ({'q': -3}, {'v': 2}, {'k': 3}, frozenset({'q'}))
    """
    both = [site for site in a.ranks if site in b.ranks]
    return Difference(
        ranks={site: b.ranks[site] - a.ranks[site] for site in both},
        only_a={site: rank for site, rank in a.ranks.items() if site not in b.ranks},
        only_b={site: rank for site, rank in b.ranks.items() if site not in a.ranks},
        gained=frozenset(both) & (b.magnitudes - a.magnitudes),
        lost=frozenset(both) & (a.magnitudes - b.magnitudes),
    )


def allocation_after(event: RankEvent) -> Allocation:
    """Return the allocation that an event left."""
    trained = (site for site, on in event.magnitudes.items() if on)
    magnitudes = trained if event.magnitudes else event.magnitude_change
    return Allocation(event.ranks, frozenset(magnitudes), event.spent)
