"""Heatmaps of ranks, of importance, and of how ranks differ, as matplotlib figures.

A site that does not exist leaves its place empty; a site with nothing left (rank 0, no importance)
is grey; everything else has a colour of the scale.
"""

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.colors import LinearSegmentedColormap, LogNorm, Normalize
from matplotlib.figure import Figure

from rankflow.report.difference import Difference, signed
from rankflow.report.grid_figure import ColourBar, Dot, Meanings, PaintedCell, draw_grid
from rankflow.report.layout import lay_out
from rankflow.report.palette import (
    BROKEN,
    DIVERGING,
    NOTHING,
    RAMP,
    RGB,
    difference_shade,
    hex_of,
    rank_shade,
    shade,
)
from rankflow.report.statistics import per_parameter

DECADES = 4

_COLOURS = LinearSegmentedColormap.from_list("rankflow", [hex_of(c) for c in RAMP])
_DIFFERENCES = LinearSegmentedColormap.from_list("difference", [hex_of(c) for c in DIVERGING])


def rank_heatmap(
    ranks: Mapping[str, int],
    *,
    title: str = "Rank",
    maximum: int | None = None,
    magnitudes: Mapping[str, bool] | None = None,
) -> Figure:
    """Draw the rank of each site, with a dot where it trains a magnitude.

    Args:
        ranks: Rank of each site, by site name; at least one site.
        title: Written above the grid.
        maximum: Rank at the top of the colour scale; give the same one to figures that are to be
            compared. None takes the largest rank.
        magnitudes: Whether each site trains a DoRA magnitude, by site name; None draws no dots.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    top = max(maximum or 0, *ranks.values(), 2)
    dotted = {site for site, on in (magnitudes or {}).items() if on}
    painted = {
        site: PaintedCell(rank_shade(rank, top), str(rank), "filled" if site in dotted else None)
        for site, rank in ranks.items()
    }
    bar = ColourBar(Normalize(1, top), _COLOURS, "rank", _whole_ticks(1, top))
    meanings = Meanings({NOTHING: "rank 0"}, {"filled": "magnitude"})
    return draw_grid(lay_out(ranks), painted, bar, meanings, title)


def importance_heatmap(
    importance: Mapping[str, float],
    *,
    title: str = "Importance",
    costs: Mapping[str, int] | None = None,
) -> Figure:
    """Draw the importance of each site on a logarithmic scale of at most four decades.

    Args:
        importance: Sum of the scores of each site's components, by site name; at least one site.
        title: Written above the grid.
        costs: Trainable parameters of each site, by site name; if given, the figure shows the
            importance per parameter.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    values = importance if costs is None else per_parameter(importance, costs)
    label = "importance" if costs is None else "importance per parameter"
    norm = _log_norm(values)
    painted = {site: PaintedCell(_importance_shade(value, norm)) for site, value in values.items()}
    meanings = Meanings({NOTHING: "none (≤ 0)", BROKEN: "not finite"}, {})
    return draw_grid(lay_out(values), painted, ColourBar(norm, _COLOURS, label), meanings, title)


def difference_heatmap(difference: Difference, *, title: str = "Rank, B - A") -> Figure:
    """Draw by how much ranks differ, with dots where only one has a magnitude.

    Args:
        difference: Of A and B; at least one site.
        title: Written above the grid.

    Returns:
        A figure with an Agg canvas; ``figure.savefig(path)`` writes it.
    """
    top = difference.largest
    dots: dict[str, Dot] = dict.fromkeys(difference.gained, "filled")
    dots |= dict.fromkeys(difference.lost, "hollow")
    painted = {
        site: PaintedCell(difference_shade(change, top), signed(change), dots.get(site))
        for site, change in difference.ranks.items()
    }
    for letter, only in (("A", difference.only_a), ("B", difference.only_b)):
        painted |= {site: PaintedCell(NOTHING, letter) for site in only}
    bar = ColourBar(Normalize(-top, top), _DIFFERENCES, "rank, B - A", _whole_ticks(-top, top))
    meanings = Meanings(
        {NOTHING: "in one only"}, {"filled": "magnitude in B only", "hollow": "in A only"}
    )
    return draw_grid(lay_out(difference.sites), painted, bar, meanings, title)


def _importance_shade(value: float, norm: LogNorm) -> RGB:
    if not math.isfinite(value):
        return BROKEN
    return shade(float(norm(value))) if value > 0 else NOTHING


def _log_norm(values: Mapping[str, float]) -> LogNorm:
    positive = [value for value in values.values() if value > 0 and math.isfinite(value)]
    top = max(positive, default=1.0)
    bottom = max(min(positive, default=top), top / 10**DECADES)
    return LogNorm(min(bottom, top / 10), top, clip=True)


def _whole_ticks(bottom: int, top: int) -> list[int]:
    """Return every whole number of a short scale, or six of a long one; always both ends."""
    count = top - bottom + 1
    return sorted({round(tick) for tick in np.linspace(bottom, top, count if count <= 8 else 6)})
