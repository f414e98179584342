"""The palette as the view takes it: one set of colours for a light ground, one for a dark one."""

from dataclasses import dataclass

from rankflow.report.palette import (
    BROKEN,
    DARK_INK,
    DIVERGING,
    DIVERGING_ON_DARK,
    LIGHT_INK,
    NOTHING,
    NOTHING_ON_DARK,
    RAMP,
    RGB,
)


@dataclass(frozen=True, slots=True)
class Colours:
    """The colours of cells on one ground.

    Attributes:
        ramp: From little to much.
        diverging: From less to more; its middle is no difference.
        nothing: What has nothing left.
        broken: What is not a number.
        inks: Of text on a light and on a dark cell.
    """

    ramp: tuple[RGB, ...]
    diverging: tuple[RGB, ...]
    nothing: RGB
    broken: RGB
    inks: tuple[RGB, RGB]


def view_colours() -> dict[str, Colours]:
    """Return the colours of cells, by the ground: ``light`` and ``dark``."""
    inks = (DARK_INK, LIGHT_INK)
    return {
        "light": Colours(RAMP, DIVERGING, NOTHING, BROKEN, inks),
        "dark": Colours(RAMP[::-1], DIVERGING_ON_DARK, NOTHING_ON_DARK, BROKEN, inks),
    }
