"""Whether two ingredients are worth more together than apart: the 2 x 2 interaction."""

from dataclasses import dataclass

from rankflow.ablation.statistics.intervals import IntervalKind, interval
from rankflow.ablation.statistics.paired import effect_size, mean
from rankflow.ablation.statistics.signflip import sign_flip_p
from rankflow.ablation.statistics.table import ScoreTable
from rankflow.errors import RankFlowError


@dataclass(frozen=True, slots=True)
class Interaction:
    """How far the effect of two ingredients together is from the sum of their single effects.

    Args:
        both: Method with both ingredients.
        one_only: Method with the one ingredient.
        other_only: Method with the other.
        neither: Method with none.
        n: Contrasts, one for each task and seed that all four finished.
        tasks: Names of their tasks.
        mean: Mean contrast; 0 means that the effects add up (or, as log ratios, multiply).
            Negative: the score is lower together than the single effects say.
        low: Lower end of the interval of the mean.
        high: Upper end.
        p: Of the sign-flip test, two-sided, not corrected.
        d_z: Mean over standard deviation of the contrasts.
        broken: Tasks and seeds left out because some method diverged there.
    """

    both: str
    one_only: str
    other_only: str
    neither: str
    n: int
    tasks: tuple[str, ...]
    mean: float
    low: float
    high: float
    p: float
    d_z: float
    broken: int


def interact(
    table: ScoreTable,
    *,
    both: str,
    one_only: str,
    other_only: str,
    neither: str,
    level: float = 0.95,
    kind: IntervalKind = "bootstrap",
    seed: int = 0,
) -> Interaction:
    """Test ``(both - one_only) - (other_only - neither)`` over tasks and seeds.

    Args:
        table: Scores of the four methods; their logarithms are contrasted if it is relative.
        both: Method with both ingredients, for example magnitude and dynamic ranks.
        one_only: Method with the one ingredient.
        other_only: Method with the other.
        neither: Method with none.
        level: Confidence of the interval.
        kind: Of the interval.
        seed: Of all resampling.

    Raises:
        RankFlowError: If methods repeat, are not in the table, or share no task and seed.
    """
    methods = (both, one_only, other_only, neither)
    if len(set(methods)) < len(methods):
        raise RankFlowError(f"an interaction needs four different methods, got {methods}")
    pairs = table.contrast({both: 1, one_only: -1, other_only: -1, neither: 1})
    low, high = interval(pairs, kind, level=level, seed=seed)
    return Interaction(
        *methods,
        n=len(pairs),
        tasks=tuple(sorted(set(pairs.task.tolist()))),
        mean=mean(pairs),
        low=low,
        high=high,
        p=sign_flip_p(pairs, seed=seed),
        d_z=effect_size(pairs),
        broken=pairs.broken,
    )
