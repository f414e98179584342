"""A comparison's verdict as one plain sentence."""

import math

from rankflow.ablation.statistics.comparison import Comparison
from rankflow.ablation.statistics.power import fewest_pairs


def sentence(found: Comparison) -> str:
    """Say what was found, for us or against us, with the numbers that it rests on.

    Log ratios are given as the per cent that they are exactly, ``100 (exp(mean) - 1)``. The
    direction is in words, so d_z is given without its sign.

    Args:
        found: A verdict of `rankflow.ablation.statistics.verdict.compare_all`.
    """
    both = f"{found.ours} and {found.theirs}"
    match found.outcome:
        case "better":
            said = (
                f"{found.ours} has {_change(found)} {found.metric} than {found.theirs} "
                f"({_evidence(found)}){_but_small(found)}"
            )
        case "worse":
            said = (
                f"{found.ours} is worse than {found.theirs}: {_change(found)} {found.metric} "
                f"({_evidence(found)}){_but_small(found)}"
            )
        case "equivalent":
            said = (
                f"{both} are equivalent in {found.metric} within a margin of "
                f"{_size(found, found.margin)}: {_change(found)} ({_interval(found)}, "
                f"equivalence {_p(found.p_equivalent)}, {found.n} pairs)"
            )
        case "no significant difference":
            said = (
                f"No significant difference in {found.metric} between {both}: {_change(found)} "
                f"({_evidence(found)}); {_needed(found)}"
            )
        case "not enough seeds":
            said = (
                f"Not enough seeds to tell {found.ours} from {found.theirs} in {found.metric}: "
                f"{_limit(found)}"
            )
        case "diverged":
            said = (
                f"No verdict on {both} in {found.metric}, because pairs are missing: "
                f"{_change(found)} in those that both finished ({_evidence(found)})"
            )
    return said + _left_out(found) + "."


def _change(found: Comparison) -> str:
    if found.mean == 0:
        return "no difference"
    return f"{_size(found, found.mean)} {'lower' if found.mean < 0 else 'higher'}"


def _evidence(found: Comparison) -> str:
    corrected = " after Holm" if found.comparisons > 1 else ""
    return (
        f"{_interval(found)}, {_p(found.p_holm)}{corrected}, {found.n} pairs, "
        f"d_z = {abs(found.d_z):.1f}"
    )


def _interval(found: Comparison) -> str:
    ends = [found.low, found.high]
    if found.outcome in ("better", "worse"):  # one direction, which is in words
        low, high = (_size(found, end) for end in sorted(ends, key=abs))
    else:
        low, high = (f"{'-' if end < 0 else '+'}{_size(found, end)}" for end in ends)
    return f"{100 * (1 - found.alpha):.3g}% interval {low} to {high}"


def _but_small(found: Comparison) -> str:
    if found.p_equivalent > found.alpha:
        return ""
    return f", though within the margin of {_size(found, found.margin)} declared not to matter"


def _needed(found: Comparison) -> str:
    if found.seeds_needed is None:
        return "there is no effect that more seeds could find"
    each = " per task" if len(found.tasks) > 1 else ""
    return f"{found.seeds_needed} seeds{each} would be needed for 80% power at this effect"


def _limit(found: Comparison) -> str:
    if found.n == 0:
        return "no pair finished"
    corrected = f", {found.p_attainable_holm:.2g} after Holm" if found.comparisons > 1 else ""
    pairs = "1 pair" if found.n == 1 else f"{found.n} pairs"
    return (
        f"with {pairs} p cannot fall below {found.p_attainable:.2g}{corrected}, and "
        f"{fewest_pairs(found.alpha, comparisons=found.comparisons)} pairs are the fewest that "
        f"always could reach {found.alpha:g}; measured: {_change(found)}"
    )


def _left_out(found: Comparison) -> str:
    said = [
        f"; {method} diverged in {count} of {found.n + found.broken} pairs"
        for method, count in found.diverged.items()
        if count
    ]
    if found.unpaired:
        said.append(f"; {found.unpaired} measured by one of the two alone")
    return "".join(said)


def _size(found: Comparison, value: float) -> str:
    if not found.relative:
        return f"{abs(value):.3g}"
    percent = 100 * abs(math.expm1(value))
    return f"{percent:.1f}%" if percent >= 0.1 else f"{percent:.1g}%"


def _p(value: float) -> str:
    if value < 0.001:
        return "p < 0.001"
    return f"p = {value:.3f}" if value < 0.1 else f"p = {value:.2f}"
