"""The error of a compressed adapter against what is left of it: a table and a figure.

The one curve keeps the best components of all sites together, the other the same rank everywhere;
the distance between them is what choosing is worth.
"""

from collections.abc import Sequence
from typing import Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich.table import Table

from rankflow.records import CurvePoint
from rankflow.report.geometry import LABEL_POINTS, TITLE_POINTS
from rankflow.report.palette import BROKEN, DARK_INK, NOTHING, RAMP, hex_of

_CHOSEN: Final = hex_of(RAMP[5])
_EVEN: Final = hex_of(RAMP[2])
_HERE: Final = hex_of(BROKEN)
_ROWS: Final = 12


def curve_table(points: Sequence[CurvePoint], whole: int) -> Table:
    """Return the curve as a table to print with rich, a dozen lines at most.

    Args:
        points: The curve, by rising budget.
        whole: Parameters of the adapter before.
    """
    table = Table(box=None, pad_edge=False)
    for heading in ("parameters", "of before", "error", "uniform ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    step = -(-len(points) // _ROWS)
    for point in points[::-1][::step][::-1]:
        table.add_row(
            f"{point.parameters:,}",
            f"{point.parameters / whole:.0%}",
            f"{point.error:.4f}",
            f"{point.uniform_error:.4f}",
        )
    return table


def draw_curve(
    points: Sequence[CurvePoint], *, whole: int, parameters: int, error: float
) -> Figure:
    """Draw the curve, and on it what was kept.

    Args:
        points: The curve, by rising budget.
        whole: Parameters of the adapter before.
        parameters: Parameters that were kept.
        error: Relative error of what was kept.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    figure = Figure(figsize=(6.4, 4.0), dpi=110, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    share = [point.parameters / whole for point in points]
    even = [point.uniform_error for point in points]
    axes.plot(share, even, color=_EVEN, marker="s", markersize=3, label="the same rank everywhere")
    chosen = [point.error for point in points]
    axes.plot(share, chosen, color=_CHOSEN, marker="o", markersize=3, label="chosen over all sites")
    axes.plot(
        [parameters / whole],
        [error],
        color=_HERE,
        marker="D",
        markersize=7,
        linestyle="none",
        label=f"kept: {parameters:,} parameters, error {error:.3g}",
    )
    ink = hex_of(DARK_INK)
    axes.set_title("What compression costs", fontsize=TITLE_POINTS, loc="left", color=ink)
    axes.set_xlabel(f"parameters left, of {whole:,}", fontsize=LABEL_POINTS, color=ink)
    axes.set_ylabel("relative error of the change", fontsize=LABEL_POINTS, color=ink)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=LABEL_POINTS, colors=ink)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color=hex_of(NOTHING), linewidth=0.5, alpha=0.6)
    axes.set_axisbelow(True)
    axes.legend(fontsize=LABEL_POINTS, frameon=False)
    return figure
