"""Every comparison with its interval, and the margin within which a difference does not matter."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import blended_transform_factory

from rankflow.ablation.report.drawing.panels import Estimate, axis_limits
from rankflow.ablation.report.drawing.style import (
    BAND,
    FAINT,
    INK,
    LABEL_POINTS,
    OUTCOMES,
    new_figure,
    tidy,
)
from rankflow.ablation.report.numbers import probability
from rankflow.ablation.statistics.comparison import Comparison

_ROW: Final = 0.26  # inches
_GAP: Final = 0.5  # rows before a comparison over all tasks
_LONGEST_PER_CENT: Final = 1.0  # log ratio; beyond it, per cent mislead the eye


@dataclass(frozen=True, slots=True)
class ForestLine:
    """One line of a forest plot.

    Attributes:
        label: What is compared, or the task.
        found: The comparison.
        whole: Whether it is over all tasks; others are drawn smaller, beneath.
    """

    label: str
    found: Comparison
    whole: bool


def draw_forest(budgets: dict[str, Sequence[ForestLine]], higher_is_better: bool) -> Figure:
    """Draw the comparisons of every budget, one panel under the other on one scale.

    Args:
        budgets: Lines by budget, from the top; none of them empty.
        higher_is_better: Whether a higher score is better, which tells which side is ours.
    """
    lines = [line for panel in budgets.values() for line in panel]
    heights = [_places(panel)[-1] + 1.2 for panel in budgets.values()]
    figure = new_figure(8.2, _ROW * sum(heights) + 0.45 * len(budgets) + 0.9)
    grid = figure.subplots(len(budgets), 1, squeeze=False, sharex=True, height_ratios=heights)
    panels = [line[0] for line in grid]
    for panel, (budget, own) in zip(panels, budgets.items(), strict=True):
        _draw_panel(panel, own)
        tidy(panel, budget)
        panel.grid(visible=False, axis="y")
        panel.spines["left"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    margins = [line.found.margin for line in lines]
    low, high = axis_limits([_estimate(line) for line in lines], [-max(margins), max(margins), 0.0])
    panels[-1].set_xlim(low, high)
    if lines[0].found.relative:
        panels[-1].set_xticks(*ratio_ticks(low, high))
    sides = ("ours is worse", "ours is better")
    left, right = sides if higher_is_better else sides[::-1]
    metric = lines[0].found.metric
    panels[-1].set_xlabel(f"← {left}      {metric}, ours against theirs      {right} →")
    _add_legend(figure, lines)
    return figure


def ratio_ticks(low: float, high: float) -> tuple[list[float], list[str]]:
    """Return places and labels of an axis of log ratios: per cent, or ratios if it is a long one.

    >>> ratio_ticks(-0.1, 0.03)[1]
    ['-8%', '-6%', '-4%', '-2%', '0%', '+2%']
    >>> ratio_ticks(-5.0, 1.0)[1]
    ['0.01x', '0.1x', '1x']
    """
    if high - low < _LONGEST_PER_CENT:
        ends = 100 * math.expm1(low), 100 * math.expm1(high)
        shares = [float(x) for x in MaxNLocator(7).tick_values(*ends) if ends[0] <= x <= ends[1]]
        return [math.log1p(x / 100) for x in shares], [f"{x:+.3g}%" if x else "0%" for x in shares]
    step = math.ceil((high - low) / math.log(10) / 7)
    first, last = math.ceil(low / math.log(10)), math.floor(high / math.log(10))
    powers = [power for power in range(first, last + 1) if power % step == 0]
    return [power * math.log(10) for power in powers], [f"{10.0**power:g}x" for power in powers]


def _draw_panel(panel: Axes, lines: Sequence[ForestLine]) -> None:
    places = _places(lines)
    margin = max(line.found.margin for line in lines)
    panel.axvspan(-margin, margin, color=BAND, zorder=0)
    panel.axvline(0, color=FAINT, linewidth=1, zorder=1)
    beside = blended_transform_factory(panel.transAxes, panel.transData)
    for place, line in zip(places, lines, strict=True):
        _draw_line(panel, place, line)
        text = f"p = {probability(line.found.p_holm)}".replace("= <", "<") + f", n = {line.found.n}"
        size = LABEL_POINTS if line.whole else LABEL_POINTS - 1
        panel.text(1.01, place, text, transform=beside, va="center", fontsize=size, color=INK)
    panel.set_yticks(places, [line.label if line.whole else f"{line.label}   " for line in lines])
    for tick, line in zip(panel.get_yticklabels(), lines, strict=True):
        tick.set(fontsize=LABEL_POINTS if line.whole else LABEL_POINTS - 1)
        tick.set(fontweight="bold" if line.whole else "normal")
    panel.set_ylim(places[-1] + 0.7, -0.7)


def _draw_line(panel: Axes, place: float, line: ForestLine) -> None:
    colour = OUTCOMES[line.found.outcome]
    if math.isfinite(line.found.low):
        ends = (line.found.low, line.found.high)
        panel.plot(ends, (place, place), color=colour, linewidth=2.2 if line.whole else 1.1)
    marker, size = ("D", 6.5) if line.whole else ("o", 4)
    panel.plot(line.found.mean, place, marker=marker, color=colour, markersize=size, zorder=3)


def _places(lines: Sequence[ForestLine]) -> list[float]:
    """Return the height of each line, in rows from the top."""
    places: list[float] = []
    for line in lines:
        if not places:
            places.append(0.0)
        else:
            places.append(places[-1] + 1 + (_GAP if line.whole else 0.0))
    return places


def _estimate(line: ForestLine) -> Estimate:
    return Estimate(line.found.mean, line.found.low, line.found.high)


def _add_legend(figure: Figure, lines: Sequence[ForestLine]) -> None:
    shown = dict.fromkeys(line.found.outcome for line in lines)
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=OUTCOMES[outcome], marker="D", linewidth=2.2, label=outcome)
        for outcome in OUTCOMES
        if outcome in shown
    ]
    handles.append(Patch(color=BAND, label="within the margin"))
    figure.legend(
        handles=handles,
        loc="outside lower left",
        ncols=4,
        frameon=False,
        fontsize=LABEL_POINTS,
        labelcolor=INK,
    )
