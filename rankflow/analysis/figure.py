"""A scatter of direction against magnitude for each run, as a matplotlib figure.

Drawn without pyplot, as the heatmaps are. The panels share their axes, so that runs compare at a
glance; where one run moved its weights so much farther than another that the other would be a
speck, each has axes of its own. A weight that has not moved is a grey cross at the origin.
"""

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rankflow.analysis.checkpoints import Checkpoint
from rankflow.analysis.correlation import Correlation
from rankflow.analysis.points import Run
from rankflow.report.layout import GridLayout
from rankflow.report.palette import DARK_INK, NOTHING, hex_of, shade

_MARKERS = "os^DvPX*"
_MOST_COLUMNS = 4
_MOST_TICKS = 8
_PANEL = 2.7  # inches
_MARGIN = 1.1  # inches, of the labels around the panels
_MOST_UNEQUAL = 3.0  # ratio of the runs' extents up to which they share their axes
_LONGEST_NAME = 26  # characters over a panel
_TITLE_POINTS, _LABEL_POINTS, _DOT_POINTS = 10.0, 8.0, 5.0
_INK, _GRID = hex_of(DARK_INK), "#e8e8e8"


def change_scatter(
    runs: Sequence[Run], correlations: Sequence[Correlation], layout: GridLayout, *, title: str
) -> Figure:
    """Draw how far weights turned (across) and grew or shrank (up), a panel for each run.

    Args:
        runs: What was measured; at least one run.
        correlations: Of each run, written into its panel.
        layout: Places the sites of all runs; its rows are the layers that colours tell.
        title: Written above the panels.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    columns = min(len(runs), _MOST_COLUMNS)
    rows = math.ceil(len(runs) / columns)
    size = (columns * _PANEL + _MARGIN, rows * (_PANEL + 0.25) + _MARGIN)
    figure = Figure(figsize=size, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    share = _can_share(runs)
    lines = [title, *([] if share else ["each panel to its own scale"])]
    figure.suptitle("\n".join(lines), fontsize=_TITLE_POINTS, color=_INK)
    panels = figure.subplots(rows, columns, sharex=share, sharey=share, squeeze=False)
    for axes, run, correlation in zip(panels.flat, runs, correlations, strict=False):
        _draw_panel(axes, run, correlation, layout)
    for axes in panels.flat[len(runs) :]:
        axes.set_visible(False)
    for axes in panels.flat[max(len(runs) - columns, 0) : len(runs)]:  # nothing stands below
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("ΔD, change of direction", fontsize=_LABEL_POINTS, color=_INK)
    for axes in panels[:, 0]:
        axes.set_ylabel("ΔM, change of magnitude", fontsize=_LABEL_POINTS, color=_INK)
    _draw_layers(figure, list(panels.flat), layout)
    _draw_moments(figure, runs, columns=3 * columns)
    return figure


def _can_share(runs: Sequence[Run]) -> bool:
    """Whether one pair of axes shows all runs well."""
    for quantity in ("dD", "dM"):
        extents = [
            max(getattr(point.change, quantity) or 0.0 for point in run.points) for run in runs
        ]
        if max(extents) > _MOST_UNEQUAL * min(extents):
            return False
    return True


def _draw_panel(axes: Axes, run: Run, correlation: Correlation, layout: GridLayout) -> None:
    marks = mark_moments(run.moments)
    for point in run.points:
        change = point.change
        if change.dD is None:
            continue
        colour = shade(layer_fraction(layout.cells[point.site].row, layout))
        axes.plot(
            change.dD,
            change.dM,
            "x" if change.is_nothing else marks[point.moment],
            markersize=_DOT_POINTS,
            markerfacecolor=hex_of(colour),
            markeredgecolor=hex_of(NOTHING) if change.is_nothing else _INK,
            markeredgewidth=1.2 if change.is_nothing else 0.4,
            alpha=0.9,
        )
    axes.set_title(
        shorten(run.name),
        fontsize=_TITLE_POINTS,
        fontweight="bold",
        loc="left",
        color=_INK,
        pad=2.2 * _LABEL_POINTS,  # the correlation stands between
    )
    axes.text(
        0,
        1.02,
        tell_correlation(correlation),
        transform=axes.transAxes,
        fontsize=_LABEL_POINTS,
        color=_INK,
        va="bottom",
    )
    axes.grid(color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=_LABEL_POINTS - 1, length=2, labelcolor=_INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(4))
        axis.set_major_formatter("{x:g}")
    axes.spines[["top", "right"]].set_visible(False)


def shorten(name: str) -> str:
    """Return the end of a name that is too long for its panel.

    >>> shorten("runs/minilm/dora"), shorten("experiments/minilm/clinc150/dora")
    ('runs/minilm/dora', '…ents/minilm/clinc150/dora')
    """
    return name if len(name) <= _LONGEST_NAME else f"…{name[1 - _LONGEST_NAME :]}"


def tell_correlation(correlation: Correlation) -> str:
    """Return Pearson's correlation with its interval, or why there is none.

    >>> from rankflow.analysis.correlation import Estimate
    >>> tell_correlation(Correlation(24, 6, Estimate(-0.312, -0.5, -0.1), Estimate(0, 0, 0)))
    'r = -0.31 [-0.50, -0.10], 24 points'
    >>> tell_correlation(Correlation(1, 1, None, None, "fewer than 3 points"))
    'no correlation: fewer than 3 points'
    """
    if correlation.pearson is None:
        return f"no correlation: {correlation.reason}"
    return f"r = {correlation.pearson}, {correlation.points} points"


def mark_moments(moments: Sequence[Checkpoint]) -> str:
    """Return a marker for each checkpoint; with too many to tell apart, the same for all."""
    return _MARKERS if len(moments) <= len(_MARKERS) else "o" * len(moments)


def layer_fraction(row: int, layout: GridLayout) -> float:
    """Return the point of the colour ramp at which a layer stands."""
    return row / max(len(layout.rows) - 1, 1)


def _draw_layers(figure: Figure, panels: list[Axes], layout: GridLayout) -> None:
    """Draw the colours of the layers, from the first at the top to the last."""
    count = len(layout.rows)
    colours = ListedColormap([hex_of(shade(layer_fraction(row, layout))) for row in range(count)])
    norm = BoundaryNorm([edge - 0.5 for edge in range(count + 1)], count)
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=panels, aspect=25, pad=0.02)
    shown = sorted({round(i * (count - 1) / _MOST_TICKS) for i in range(_MOST_TICKS + 1)})
    bar.set_ticks(shown, labels=[layout.rows[row] for row in shown])
    bar.set_label("layer", fontsize=_LABEL_POINTS)
    bar.ax.tick_params(labelsize=_LABEL_POINTS - 1, length=0)
    bar.ax.invert_yaxis()
    bar.minorticks_off()
    bar.outline.set_visible(False)


def _draw_moments(figure: Figure, runs: Sequence[Run], columns: int) -> None:
    """Explain the markers, if they mean the same in all runs and can be told apart."""
    labels = [[moment.label for moment in run.moments] for run in runs]
    longest = max(labels, key=len)
    if len(longest) > len(_MARKERS) or any(one != longest[: len(one)] for one in labels):
        return
    entries = [
        _legend_mark(marker, label) for marker, label in zip(_MARKERS, longest, strict=False)
    ]
    if any(point.change.is_nothing for run in runs for point in run.points):
        entries.append(_legend_mark("x", "has not moved"))
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=min(len(entries), columns),
        frameon=False,
        fontsize=_LABEL_POINTS,
        handletextpad=0.3,
    )


def _legend_mark(marker: str, label: str) -> Line2D:
    edge = hex_of(NOTHING) if marker == "x" else _INK
    return Line2D(
        [], [], linestyle="none", marker=marker, markersize=_DOT_POINTS, label=label,
        markerfacecolor="white", markeredgecolor=edge,
    )  # fmt: skip
