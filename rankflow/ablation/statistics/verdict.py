"""One honest verdict for each comparison that was declared before measuring.

How often it is wrong was simulated: four methods against a reference on three tasks, all alike,
where seeds move all methods together. Of 1,000 such tables 4 to 5 per cent held a false ``better``
or ``worse``, and 14 to 17 per cent would have without Holm's correction.

The verdict takes pairs for independent. What a seed does to all methods cancels in a pair; what it
does to the *difference* of two methods must not be the same in several tasks. Where 10% of the
variance of each score was such an effect, 6 to 7 per cent of tables held a false claim, where it
was 30%, 13 to 15 per cent. Different seeds on every task rule it out.
"""

import math
from collections.abc import Sequence

from rankflow.ablation.statistics.comparison import Comparison as Comparison
from rankflow.ablation.statistics.comparison import Outcome
from rankflow.ablation.statistics.holm import holm
from rankflow.ablation.statistics.intervals import IntervalKind, interval
from rankflow.ablation.statistics.paired import effect_size, equivalence_p, mean
from rankflow.ablation.statistics.power import check_level, pairs_needed, smallest_p
from rankflow.ablation.statistics.signflip import sign_flip_p
from rankflow.ablation.statistics.table import Pairs, ScoreTable
from rankflow.ablation.statistics.wording import sentence as sentence


def compare_all(
    table: ScoreTable,
    comparisons: Sequence[tuple[str, str]],
    *,
    margin: float,
    alpha: float = 0.05,
    seed: int = 0,
    kind: IntervalKind = "bootstrap",
) -> list[Comparison]:
    """Judge every comparison that was declared, all together.

    - ``better``, ``worse``: Holm's p-value is at most ``alpha`` and the interval excludes 0.
    - ``not enough seeds``: so few pairs finished that p could not reach ``alpha`` after Holm even
      if they all agreed. It comes before equivalence: differences that could not have been found
      are not evidence of none.
    - ``equivalent``: the mean lies within the margin by two one-sided tests at ``alpha``, and
      every pair finished.
    - ``diverged``: the pairs that both finished would speak for a method that diverged in others,
      or for equivalence. What finished is then no fair sample.
    - ``no significant difference``: none of these. It is no proof that there is none.

    Args:
        table: The scores.
        comparisons: Ours and theirs; all that were declared, since Holm counts them.
        margin: Largest difference that does not matter, in the differences' unit: a log ratio of
            0.01 is 1%.
        alpha: Chance that we accept of any false ``better`` or ``worse`` among all comparisons.
        seed: Of all resampling.
        kind: Of the interval.

    Returns:
        The verdicts, in the order declared.

    Raises:
        RankFlowError: If a method is not in the table, two methods share no task and seed, or the
            margin or the level makes no sense.
    """
    check_level(alpha)
    paired = [table.pairs(ours, theirs) for ours, theirs in comparisons]
    p_values = [sign_flip_p(pairs, seed=seed) for pairs in paired]
    adjusted = holm(p_values).tolist()
    verdicts = []
    for i, (ours, theirs) in enumerate(comparisons):
        pairs = paired[i]
        middle, effect = mean(pairs), effect_size(pairs)
        low, high = interval(pairs, kind, level=1 - alpha, seed=seed)
        p_equivalent = equivalence_p(pairs, margin)
        attainable = smallest_p(len(pairs))
        attainable_holm = float(holm([*p_values[:i], attainable, *p_values[i + 1 :]])[i])
        tasks = tuple(sorted(set(pairs.task.tolist())))
        verdicts.append(
            Comparison(
                ours=ours,
                theirs=theirs,
                metric=table.metric,
                relative=table.relative,
                n=len(pairs),
                tasks=tasks,
                mean=middle,
                low=low,
                high=high,
                p=p_values[i],
                p_holm=adjusted[i],
                d_z=effect,
                p_equivalent=p_equivalent,
                margin=margin,
                p_attainable=attainable,
                p_attainable_holm=attainable_holm,
                seeds_needed=_seeds_needed(effect, alpha, len(comparisons), len(tasks)),
                broken=pairs.broken,
                diverged=pairs.diverged,
                unpaired=pairs.unpaired,
                comparisons=len(comparisons),
                alpha=alpha,
                outcome=_judge(
                    pairs,
                    winner=ours if (middle > 0) == table.higher_is_better else theirs,
                    ours=ours,
                    significant=adjusted[i] <= alpha and (low > 0 or high < 0),
                    attainable=attainable_holm <= alpha,
                    equivalent=p_equivalent <= alpha,
                ),
            )
        )
    return verdicts


def _judge(
    pairs: Pairs, *, winner: str, ours: str, significant: bool, attainable: bool, equivalent: bool
) -> Outcome:
    if significant:
        if pairs.diverged[winner]:
            return "diverged"
        return "better" if winner == ours else "worse"
    if not attainable:
        return "not enough seeds"
    if equivalent:
        return "diverged" if pairs.broken else "equivalent"
    return "no significant difference"


def _seeds_needed(effect: float, alpha: float, comparisons: int, tasks: int) -> int | None:
    needed = pairs_needed(effect, alpha, comparisons=comparisons)
    return None if needed is None else math.ceil(needed / tasks)
