"""The figures of a report: which there are numbers for, and what they show."""

import re
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median_low

from rankflow.ablation.records import Place, RankHistory
from rankflow.ablation.report.document import Block, Heading, Picture
from rankflow.ablation.report.drawing.curves import CurveAxes, draw_curves
from rankflow.ablation.report.drawing.dots import DotPanel, draw_dots
from rankflow.ablation.report.drawing.forest import ForestLine, draw_forest
from rankflow.ablation.report.drawing.panels import Estimate
from rankflow.ablation.report.drawing.ranks import FinalRanks, draw_ranks
from rankflow.ablation.report.drawing.scatter import Price, draw_scatter
from rankflow.ablation.report.drawing.style import MOST_STYLES, MethodStyle, as_png, style_methods
from rankflow.ablation.report.rows import Gathered, MethodRow
from rankflow.ablation.report.verdicts import METRICS, Verdict
from rankflow.ablation.statistics.spread import Spread
from rankflow.specs.ablation import HIGHER_IS_BETTER, AblationSpec

RECOVERY = "rank_spearman"
"""Metric that says how well planted ranks were found again."""

_HOLLOW = "Hollow: some seeds diverged, and the mean is over the others."
_CUT = "Intervals that would dwarf the means are cut at the frame."

Rows = Mapping[Place, MethodRow]


def picture_blocks(
    gathered: Gathered, rows: Rows, pooled: Sequence[Verdict], by_task: Sequence[Verdict]
) -> list[Block]:
    """Return the figures for which there are numbers.

    Args:
        gathered: The results.
        rows: The row of every place.
        pooled: The verdict over all tasks at each budget.
        by_task: The verdict on each task at each budget.
    """
    spec = gathered.spec
    compared = [method for pair in spec.compare for method in pair]
    styles = style_methods(spec.methods, [*compared, *(spec.interaction or ())])
    pictures = [
        *_curves(spec, rows, styles),
        *_forest(spec, pooled, by_task),
        *_prices(spec, rows, styles),
        *_forgetting(spec, rows, styles),
        *_recovery(spec, rows, styles),
        *_ranks(gathered),
    ]
    return [Heading(2, "Figures"), *pictures] if pictures else []


def _curves(spec: AblationSpec, rows: Rows, styles: dict[str, MethodStyle]) -> list[Picture]:
    places = _budget_places(spec, rows)
    if len(spec.budgets) < 2 or len(set(places.values())) < len(spec.budgets):
        return []
    by_rank = all(budget.rank is not None for budget in spec.budgets)
    tasks: dict[str, dict[str, dict[float, Estimate]]] = {}
    for place, row in rows.items():
        estimate = Estimate.of(row.quality)
        if estimate is not None:
            curves = tasks.setdefault(place.task, {})
            curves.setdefault(place.method, {})[places[place.budget]] = estimate
    if not tasks:
        return []
    axes = CurveAxes(
        budget="budget, as the rank of plain LoRA" if by_rank else "budget, in parameters",
        ticks={x: f"{x:g}" if by_rank else f"{x:,.0f}" for x in places.values()},
        metric=METRICS[spec.judge],
    )
    rest = (
        f" Grey, without intervals: methods beyond the first {MOST_STYLES}."
        if any(not style.listed for style in styles.values())
        else ""
    )
    caption = (
        f"Quality against budget: mean {METRICS[spec.judge]} over seeds with intervals of "
        f"{100 * (1 - spec.alpha):g}%. Points are shifted sideways a little, so that they do not "
        f"hide each other. {_HOLLOW} {_CUT}{rest}"
    )
    return [Picture("quality", caption, as_png(draw_curves(tasks, styles, axes)))]


def _forest(
    spec: AblationSpec, pooled: Sequence[Verdict], by_task: Sequence[Verdict]
) -> list[Picture]:
    budgets: dict[str, list[ForestLine]] = {}
    for verdict in pooled:
        for found in verdict.comparisons:
            pair = (found.ours, found.theirs)
            own = [
                ForestLine(other.task, comparison, whole=False)
                for other in by_task
                if other.budget == verdict.budget
                for comparison in other.comparisons
                if (comparison.ours, comparison.theirs) == pair and comparison.n
            ]
            if found.n:
                whole = ForestLine(f"{found.ours} - {found.theirs}", found, whole=True)
                budgets.setdefault(verdict.budget, []).extend([whole, *own])
    kinds = {line.found.relative for lines in budgets.values() for line in lines}
    if len(kinds) != 1:  # nothing to draw, or two units on one scale
        return []
    caption = (
        f"The declared comparisons: mean paired difference with its interval of "
        f"{100 * (1 - spec.alpha):g}%, over all tasks (diamonds) and on each (circles), with p "
        f"after Holm and the number of pairs. {_CUT}"
    )
    figure = draw_forest({**budgets}, HIGHER_IS_BETTER[spec.judge])
    return [Picture("comparisons", caption, as_png(figure))]


def _prices(spec: AblationSpec, rows: Rows, styles: dict[str, MethodStyle]) -> list[Picture]:
    by_latency = any(row.unmerged is not None for row in rows.values())

    def price_of(row: MethodRow) -> Price | None:
        quality = Estimate.of(row.quality)
        finals = [float(parameters.final) for parameters in row.parameters]
        unmerged = row.unmerged if by_latency else mean(finals) if finals else None
        if quality is None or unmerged is None:
            return None
        return Price(quality, unmerged, row.merged if by_latency else None)

    panels = [
        [
            (
                f"{task.name}, {budget.label}",
                {
                    method: price
                    for method in spec.methods
                    if (price := price_of(rows[Place(task.name, budget.label, method)]))
                },
            )
            for task in spec.tasks
        ]
        for budget in spec.budgets
    ]
    if not any(points for line in panels for _, points in line):
        return []
    label = "forward pass, times the base model's" if by_latency else "final parameters"
    caption = (
        f"Quality against {'inference time' if by_latency else 'parameters'}: "
        f"{METRICS[spec.judge]} ({'higher' if HIGHER_IS_BETTER[spec.judge] else 'lower'} is "
        f"better) of each method as trained"
        f"{', with a cross where merging brings it' if by_latency else ''}. {_HOLLOW} {_CUT}"
    )
    figure = draw_scatter(panels, styles, price=label, metric=METRICS[spec.judge])
    return [Picture("price", caption, as_png(figure))]


def _forgetting(spec: AblationSpec, rows: Rows, styles: dict[str, MethodStyle]) -> list[Picture]:
    measures = dict.fromkeys(row.forgetting for row in rows.values() if row.forgetting)
    return [_forgetting_of(measure, spec, rows, styles) for measure in measures]


def _forgetting_of(
    measure: str, spec: AblationSpec, rows: Rows, styles: dict[str, MethodStyle]
) -> Picture:
    def after(row: MethodRow) -> Spread | None:
        return row.after if row.forgetting == measure else None

    def before(row: MethodRow) -> float | None:
        return row.before if row.forgetting == measure else None

    caption = (
        f"Forgetting: {measure} after training on the task, against that of the base model "
        f"(dashed). {_HOLLOW} {_CUT}"
    )
    panels = _dot_panels(spec, rows, after, before)
    figure = draw_dots(panels, styles, label=measure, reference="base model")
    return Picture(_file_name("forgetting", measure), caption, as_png(figure))


def _recovery(spec: AblationSpec, rows: Rows, styles: dict[str, MethodStyle]) -> list[Picture]:
    panels = _dot_panels(spec, rows, lambda row: row.others.get(RECOVERY), lambda row: None)
    if not panels:
        return []
    caption = (
        f"Recovery of the planted ranks: Spearman correlation of the final ranks with the true "
        f"ones; 1 is perfect order. {_HOLLOW} {_CUT}"
    )
    figure = draw_dots(panels, styles, label="rank correlation")
    return [Picture("recovery", caption, as_png(figure))]


def _dot_panels(
    spec: AblationSpec,
    rows: Rows,
    value: Callable[[MethodRow], Spread | None],
    reference: Callable[[MethodRow], float | None],
) -> list[list[tuple[str, DotPanel]]]:
    """Return a panel for each task with a number, by budget; nothing without any number."""

    def panel(task: str, budget: str) -> DotPanel:
        own = [rows[Place(task, budget, method)] for method in spec.methods]
        spreads = {row.place.method: value(row) for row in own}
        estimates = {m: Estimate.of(s) for m, s in spreads.items() if s is not None}
        references = [r for row in own if (r := reference(row)) is not None]
        return DotPanel(
            {method: e for method, e in estimates.items() if e is not None},
            mean(references) if references else None,
        )

    panels = [
        [(f"{t.name}, {b.label}", panel(t.name, b.label)) for t in spec.tasks] for b in spec.budgets
    ]
    full = [
        column
        for column in range(len(spec.tasks))
        if any(line[column][1].estimates for line in panels)
    ]
    return [[line[column] for column in full] for line in panels] if full else []


def _ranks(gathered: Gathered) -> list[Picture]:
    pictures = []
    for task in gathered.spec.tasks:
        for budget in gathered.spec.budgets:
            places = gathered.places(task.name, budget.label)
            found = [ranks for place in places if (ranks := _final_ranks(gathered, place))]
            if found:
                caption = (
                    f"Final ranks on {task.name} at {budget.label}: the median over seeds at each "
                    f"site, on one scale; a dot marks a magnitude that most seeds train."
                )
                name = _file_name("ranks", task.name, budget.label)
                pictures.append(Picture(name, caption, as_png(draw_ranks(found))))
    return pictures


def _final_ranks(gathered: Gathered, place: Place) -> FinalRanks | None:
    """Return the median ranks of a method that moves ranks, or starts with uneven ones."""
    histories = [r.ranks for r in gathered.tests[place] if r.ranks is not None and r.ranks.moments]
    if not any(_is_uneven(history) for history in histories):
        return None
    sites = histories[0].sites
    ends = [history.moments[-1] for history in histories if history.sites == sites]
    trained = [sum(index in end.magnitudes for end in ends) for index in range(len(sites))]
    seeds = f"{len(ends)} seed{'s' if len(ends) > 1 else ''}"
    return FinalRanks(
        title=f"{place.method} ({seeds})",
        ranks={site: median_low(end.ranks[i] for end in ends) for i, site in enumerate(sites)},
        magnitudes={site: 2 * trained[i] > len(ends) for i, site in enumerate(sites)}
        if any(trained)
        else {},
    )


def _is_uneven(history: RankHistory) -> bool:
    """Whether ranks moved, or differ by more than what fills a budget up."""
    ranks = history.moments[-1].ranks
    return len(history.moments) > 1 or max(ranks) - min(ranks) > 1


def _file_name(*parts: str) -> str:
    return re.sub(r"[^\w.-]+", "-", "-".join(parts).replace(",", ""))


def _budget_places(spec: AblationSpec, rows: Rows) -> dict[str, float]:
    """Return where each budget stands on an axis: by rank if all are ranks, else by parameters."""
    if all(budget.rank is not None for budget in spec.budgets):
        return {budget.label: float(budget.rank or 0) for budget in spec.budgets}
    places: dict[str, float] = {}
    for budget in spec.budgets:
        counts = [row.budget for place, row in rows.items() if place.budget == budget.label]
        known = [count for count in counts if count]
        if budget.params is not None or known:
            places[budget.label] = float(budget.params or mean(known))
    return places
