"""What was found about one method against another."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Outcome = Literal[
    "better", "worse", "equivalent", "no significant difference", "not enough seeds", "diverged"
]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What was found about our method against theirs.

    Args:
        ours: The method judged.
        theirs: The method that it is held against.
        metric: What was compared.
        relative: Whether differences are log ratios.
        n: Pairs that both finished.
        tasks: Names of their tasks.
        mean: Mean over tasks of the mean difference, ours minus theirs (or the log ratio).
        low: Lower end of the interval of the mean; NaN for fewer than two pairs.
        high: Upper end.
        p: Of the sign-flip test, two-sided.
        p_holm: The same after Holm over all comparisons declared.
        d_z: Mean over standard deviation of the differences; NaN for fewer than two pairs.
        p_equivalent: Of the two one-sided tests within the margin; not corrected.
        margin: Largest difference that does not matter, in the unit of the mean.
        p_attainable: Smallest p that so many pairs could give.
        p_attainable_holm: The same after Holm, the other comparisons as they are.
        seeds_needed: Seeds for each task that would find this d_z with 80% power at
            ``alpha / m``; None where there is no effect to find.
        broken: Pairs left out because a method diverged there.
        diverged: How many of those each of the two methods lost.
        unpaired: Tasks and seeds left out because only one of the two was measured there.
        comparisons: Number ``m`` of comparisons declared.
        alpha: Level of every claim; the interval's confidence is ``1 - alpha``.
        outcome: The verdict.
    """

    ours: str
    theirs: str
    metric: str
    relative: bool
    n: int
    tasks: tuple[str, ...]
    mean: float
    low: float
    high: float
    p: float
    p_holm: float
    d_z: float
    p_equivalent: float
    margin: float
    p_attainable: float
    p_attainable_holm: float
    seeds_needed: int | None
    broken: int
    diverged: Mapping[str, int]
    unpaired: int
    comparisons: int
    alpha: float
    outcome: Outcome
