"""What all figures share: colours, letters, axes, and how a figure becomes a file.

The colours are those of Okabe and Ito, which colour-blind eyes tell apart, with two of the same
kind added; every method has a marker of its own besides, so that nothing rests on colour alone.

Reference: Okabe and Ito, "Color Universal Design", 2008.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from rankflow.ablation.statistics.comparison import Outcome

INK: Final = "#262626"
FAINT: Final = "#8a8a8a"
GRID: Final = "#e4e4e4"
BAND: Final = "#eeeeee"

LABEL_POINTS: Final = 8.5
TITLE_POINTS: Final = 10.0
DOTS_PER_INCH: Final = 150

_COLOURS: Final = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
    "#8c510a",
    "#5e3c99",
    "#7a9a01",
)
_MARKERS: Final = "os^DvPX<>*"

MOST_STYLES: Final = len(_COLOURS)

OUTCOMES: Final[Mapping[Outcome, str]] = {
    "better": "#0072b2",
    "worse": "#d55e00",
    "equivalent": "#009e73",
    "no significant difference": "#6b6b6b",
    "not enough seeds": "#ababab",
    "diverged": "#cc79a7",
}


@dataclass(frozen=True, slots=True)
class MethodStyle:
    """How a method looks in every figure.

    Attributes:
        colour: Of its lines and markers.
        marker: Of its points.
        listed: Whether the legend names it; those beyond ``MOST_STYLES`` are grey and are not.
    """

    colour: str
    marker: str
    listed: bool


def style_methods(methods: Sequence[str], first: Sequence[str] = ()) -> dict[str, MethodStyle]:
    """Give each method a style of its own while there are any.

    Args:
        methods: All methods.
        first: Those that come first where there are more methods than styles.
    """
    order = [*dict.fromkeys([*first, *methods])] if len(methods) > MOST_STYLES else [*methods]
    styles = {
        method: MethodStyle(colour, marker, listed=True)
        for method, colour, marker in zip(order, _COLOURS, _MARKERS, strict=False)
    }
    rest = MethodStyle("#bdbdbd", ".", listed=False)
    return {method: styles.get(method, rest) for method in methods}


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, whose parts find room by themselves."""
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def tidy(axes: Axes, title: str = "") -> None:
    """Give axes the look of the report."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(labelsize=LABEL_POINTS, color=FAINT, labelcolor=INK)
    axes.xaxis.label.set(size=LABEL_POINTS, color=INK)
    axes.yaxis.label.set(size=LABEL_POINTS, color=INK)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    if title:
        axes.set_title(title, fontsize=TITLE_POINTS, fontweight="bold", loc="left", color=INK)


def as_png(figure: Figure) -> bytes:
    """Return the figure as a PNG file, the same bytes each time."""
    file = io.BytesIO()
    figure.savefig(file, dpi=DOTS_PER_INCH, format="png", metadata={"Software": None})
    return file.getvalue()
