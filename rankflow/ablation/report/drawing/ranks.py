"""Where methods with dynamic ranks put their ranks: heatmaps side by side on one scale."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from rankflow.ablation.report.drawing.style import DOTS_PER_INCH
from rankflow.report.grid_figure import render_pixels
from rankflow.report.heatmap import rank_heatmap

_RESOLUTION: Final = 110  # of the heatmaps, in dots per inch
_WIDEST: Final = 1500  # pixels of a line of heatmaps
_GAP: Final = 20

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class FinalRanks:
    """The ranks at which a method ended.

    Attributes:
        title: What is above its heatmap.
        ranks: By site.
        magnitudes: Whether a site trains a magnitude, by site; empty where none does.
    """

    title: str
    ranks: Mapping[str, int]
    magnitudes: Mapping[str, bool]


def draw_ranks(methods: Sequence[FinalRanks]) -> Figure:
    """Draw a heatmap for each method; colours mean the same in all of them.

    Args:
        methods: What to draw, in order; at least one.
    """
    top = max(rank for method in methods for rank in method.ranks.values())
    drawn = [
        render_pixels(
            rank_heatmap(
                method.ranks,
                title=method.title,
                maximum=top,
                magnitudes=method.magnitudes or None,
            ),
            dots_per_inch=_RESOLUTION,
        )
        for method in methods
    ]
    return _show(_stack([_join(line) for line in _break(drawn)]))


def _break(drawn: Sequence[Pixels]) -> list[list[Pixels]]:
    """Cut a row of images into lines no wider than ``_WIDEST``, each with one at least."""
    lines: list[list[Pixels]] = [[]]
    for image in drawn:
        used = sum(other.shape[1] + _GAP for other in lines[-1])
        if lines[-1] and used + image.shape[1] > _WIDEST:
            lines.append([])
        lines[-1].append(image)
    return lines


def _join(line: Sequence[Pixels]) -> Pixels:
    height = max(image.shape[0] for image in line)
    return np.concatenate([_pad(image, height, image.shape[1] + _GAP) for image in line], axis=1)


def _stack(lines: Sequence[Pixels]) -> Pixels:
    width = max(line.shape[1] for line in lines)
    return np.concatenate([_pad(line, line.shape[0] + _GAP, width) for line in lines], axis=0)


def _pad(image: Pixels, height: int, width: int) -> Pixels:
    rest = ((0, height - image.shape[0]), (0, width - image.shape[1]), (0, 0))
    return np.pad(image, rest, constant_values=255)


def _show(pixels: Pixels) -> Figure:
    """Return a figure that is the image."""
    height, width = pixels.shape[:2]
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    figure.figimage(pixels)
    return figure
