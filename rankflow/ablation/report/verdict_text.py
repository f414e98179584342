"""The verdict, in plain language, before any number is shown."""

from collections import Counter
from collections.abc import Iterable, Sequence
from math import ceil, isfinite
from typing import get_args

from rankflow.ablation.report.document import Block, Bullets, Heading, Paragraph
from rankflow.ablation.report.numbers import change, probability, share_range
from rankflow.ablation.report.rows import Gathered, MethodRow
from rankflow.ablation.report.troubles import (
    Progress,
    Trouble,
    above_on_the_way,
    diverged,
    failures,
    off_budget,
    progress,
    unsupported,
)
from rankflow.ablation.report.verdicts import METRICS, Verdict
from rankflow.ablation.statistics.comparison import Comparison, Outcome
from rankflow.ablation.statistics.interaction import Interaction
from rankflow.ablation.statistics.power import can_reach, fewest_pairs
from rankflow.ablation.statistics.verdict import sentence
from rankflow.specs.ablation import HIGHER_IS_BETTER, AblationSpec


def verdict_blocks(gathered: Gathered, verdicts: Sequence[Verdict]) -> list[Block]:
    """Return what was found for every declared comparison, for us or against us.

    Args:
        gathered: The results.
        verdicts: The verdict over all tasks at each budget.
    """
    spec = gathered.spec
    blocks: list[Block] = [Heading(2, "Verdict")]
    if not spec.compare and spec.interaction is None:
        blocks.append(Paragraph("No comparison was declared, so there is nothing to judge."))
    else:
        blocks += [Paragraph(_tally(verdicts)), Paragraph(_what_is_judged(spec))]
    for verdict in verdicts if len(blocks) > 2 else ():
        blocks += [Heading(3, f"At {verdict.budget}"), _judged(spec, verdict)]
        blocks += _seed_warning(spec, verdict.comparisons)
    return blocks


def task_verdict_blocks(gathered: Gathered, verdicts: Sequence[Verdict]) -> list[Block]:
    """Return the same for each task by itself; nothing without any verdict.

    Args:
        gathered: The results.
        verdicts: The verdict on each task at each budget.
    """
    spec = gathered.spec
    if not verdicts or not (spec.compare or spec.interaction):
        return []
    blocks: list[Block] = [Heading(2, "Verdict on each task")]
    blocks += _seed_warning(spec, [c for verdict in verdicts for c in verdict.comparisons])
    for verdict in verdicts:
        title = Heading(3, f"{verdict.task} at {verdict.budget}")
        blocks += [title, _judged(spec, verdict)]
    return blocks


def trouble_blocks(gathered: Gathered, rows: Sequence[MethodRow]) -> list[Block]:
    """Return what broke, is missing, or missed its budget."""
    found = progress(gathered)
    items = [Paragraph(_count(found), lead=_lead(found))]
    items += _listed("Failed", failures(gathered))
    items += _listed("Unsupported", unsupported(gathered))
    items += _listed("Diverged", diverged(gathered))
    items += _misses(off_budget(rows))
    peaks = above_on_the_way(rows)
    if peaks:
        listed = ", ".join(f"{method} {100 * share:.0f}%" for method, share in peaks.items())
        text = f"some trained more than the budget on the way to it, at most: {listed}."
        items.append(Paragraph(text, lead="Peak:"))
    if max((row.quality.n for row in rows), default=0) < 2:
        text = "without a second seed nothing can be told from chance, and there are no intervals."
        items.append(Paragraph(text, lead="Single seed:"))
    if gathered.strangers:
        text = f"{gathered.strangers} results belong to no cell of this spec."
        items.append(Paragraph(text, lead="Left out."))
    return [Heading(2, "State of the run"), Bullets(tuple(items))]


def interaction_sentence(found: Interaction, spec: AblationSpec, relative: bool) -> str:
    """Say whether two ingredients together differ from what each does alone.

    Args:
        found: The interaction.
        spec: The ablation.
        relative: Whether it is a log ratio.
    """
    parts = f"{found.both} (together), {found.one_only} and {found.other_only} (alone)"
    middle, low, high = (change(v, relative) for v in (found.mean, found.low, found.high))
    ends = f", interval {low} to {high}" if isfinite(found.low) else ""
    numbers = f"{middle}{ends}, p {_equals(found.p)}, n = {found.n}"
    if not can_reach(found.n, spec.alpha):
        fewest = fewest_pairs(spec.alpha)
        said = f"not enough seeds to tell ({found.n} of at least {fewest} contrasts)"
    elif found.p > spec.alpha or found.low <= 0 <= found.high:
        said = "no significant interaction: the two effects may simply add up"
    elif (found.mean > 0) == HIGHER_IS_BETTER[spec.judge]:
        said = "the two are worth more together than the sum of what each is worth alone"
    else:
        said = "the two are worth less together than the sum of what each is worth alone"
    broken = (
        f"; {found.broken} left out because a run diverged, so the rest may be no fair sample"
        if found.broken
        else ""
    )
    return f"Interaction of {parts} over {found.neither}: {said} ({numbers}{broken})."


def _equals(p: float) -> str:
    text = probability(p)
    return text if text.startswith("<") else f"= {text}"


def _tally(verdicts: Iterable[Verdict]) -> str:
    """Say how many comparisons came out how, over all budgets.

    What could not be measured counts too.
    """
    counts = Counter(found.outcome for verdict in verdicts for found in verdict.comparisons)
    unmeasured = sum(len(verdict.unmeasured) for verdict in verdicts)
    parts = [f"{counts[outcome]} {outcome}" for outcome in get_args(Outcome) if counts[outcome]]
    parts += [f"{unmeasured} not measured"] if unmeasured else []
    total = counts.total() + unmeasured
    return f"Of {total} comparisons declared, counted at each budget: {', '.join(parts) or 'none'}."


def _judged(spec: AblationSpec, verdict: Verdict) -> Bullets:
    lines = [Paragraph(sentence(comparison)) for comparison in verdict.comparisons]
    if verdict.unmeasured:
        pairs = ", ".join(f"{ours} with {theirs}" for ours, theirs in verdict.unmeasured)
        lines.append(Paragraph(f"{pairs}: no task and seed that both finished.", "Not measured."))
    if verdict.interaction is not None:
        text = interaction_sentence(verdict.interaction, spec, verdict.relative)
        lines.append(Paragraph(text))
    elif spec.interaction is not None:
        text = f"the interaction of {', '.join(spec.interaction)}."
        lines.append(Paragraph(text, lead="Not measured."))
    return Bullets(tuple(lines))


def _seed_warning(spec: AblationSpec, comparisons: Sequence[Comparison]) -> list[Block]:
    """Say how many seeds it takes where some comparison could never be significant."""
    weak = [c for c in comparisons if not can_reach(c.n, spec.alpha, comparisons=c.comparisons)]
    if not weak:
        return []
    fewest = max(fewest_pairs(spec.alpha, comparisons=c.comparisons) for c in weak)
    tasks = max(1, *(len(c.tasks) for c in weak))
    has = "comparison has" if len(comparisons) == 1 else "comparisons have"
    text = (
        f"{len(weak)} of {len(comparisons)} {has} too few pairs to be sure to reach significance, "
        f"however large the difference: {min(c.n for c in weak)} where {fewest} are needed. Run at "
        f"least {ceil(fewest / tasks)} seeds{' on each task' if tasks > 1 else ''}."
    )
    return [Paragraph(text, lead="Warning.")]


def _what_is_judged(spec: AblationSpec) -> str:
    better = "higher" if HIGHER_IS_BETTER[spec.judge] else "lower"
    tasks = len(spec.tasks)
    over = f"over all {tasks} tasks, paired by task and seed" if tasks > 1 else "paired by seed"
    return (
        f"Judged: {METRICS[spec.judge]} ({better} is better), {over}. Only the comparisons "
        f"declared beforehand are tested; p-values are corrected (Holm) over those at one budget"
        f"{', on each task by itself where a task is judged alone' if tasks > 1 else ''}."
    )


def _lead(found: Progress) -> str:
    return "Complete." if found.is_whole else "Not finished: these results are preliminary."


def _count(found: Progress) -> str:
    parts = [f"{found.done} of {found.asked} cells finished"]
    parts += [f"{found.failed} failed"] if found.failed else []
    parts += [f"{found.unsupported} are of methods that cannot run"] if found.unsupported else []
    if found.missing:
        by = ", ".join(f"{method} {count}" for method, count in found.missing.items())
        parts.append(f"{sum(found.missing.values())} have not run ({by})")
    return ", ".join(parts) + "."


def _listed(lead: str, troubles: Iterable[Trouble]) -> list[Paragraph]:
    return [
        Paragraph(
            f"{t.method}, {t.cells} {'cell' if t.cells == 1 else 'cells'} ({t.where})"
            f"{': ' + t.reason if t.reason else ''}.",
            lead=f"{lead}.",
        )
        for t in troubles
    ]


def _misses(rows: Iterable[MethodRow]) -> list[Paragraph]:
    places: dict[str, list[str]] = {}
    for row in rows:
        finals = [parameters.final for parameters in row.parameters]
        where = f"{share_range(finals, row.budget)} ({row.place.task}, {row.place.budget})"
        places.setdefault(row.place.method, []).append(where)
    return [
        Paragraph(f"{method} ended at {', '.join(where)}.", lead="Off budget.")
        for method, where in places.items()
    ]
