"""The colours that figures and the terminal share: light is little, dark is much.

The ramp is ColorBrewer's YlGnBu without its palest end: its lightness falls steadily, so that it
reads the same to colour-blind eyes and in grey. What is not a point of the scale (nothing left,
not a number) has a colour outside the ramp. Differences have ColorBrewer's PRGn: purple is less,
green is more. On a dark ground the ramp is turned round, so that much still stands out and little
stays near the ground.

Reference: Harrower and Brewer, "ColorBrewer.org", The Cartographic Journal 40(1), 2003.
"""

RGB = tuple[int, int, int]

RAMP: tuple[RGB, ...] = (
    (226, 244, 192),
    (199, 233, 180),
    (127, 205, 187),
    (65, 182, 196),
    (29, 145, 192),
    (34, 94, 168),
    (37, 52, 148),
    (8, 29, 88),
)
DIVERGING: tuple[RGB, ...] = (
    (118, 42, 131),
    (153, 112, 171),
    (194, 165, 207),
    (231, 212, 232),
    (242, 242, 242),
    (217, 240, 211),
    (166, 219, 160),
    (90, 174, 97),
    (27, 120, 55),
)
DIVERGING_ON_DARK: tuple[RGB, ...] = (
    (226, 188, 240),
    (180, 130, 200),
    (128, 86, 147),
    (84, 62, 96),
    (54, 57, 63),
    (46, 86, 60),
    (58, 126, 76),
    (98, 176, 112),
    (172, 228, 168),
)
NOTHING: RGB = (205, 205, 205)
NOTHING_ON_DARK: RGB = (78, 82, 88)
BROKEN: RGB = (213, 94, 0)
DARK_INK: RGB = (38, 38, 38)
LIGHT_INK: RGB = (255, 255, 255)


def shade(fraction: float, ramp: tuple[RGB, ...] = RAMP) -> RGB:
    """Return the colour of a point of the scale.

    Args:
        fraction: From 0 (the least) to 1 (the most); values outside take the nearer end.
        ramp: The scale's colours, evenly spaced.

    >>> shade(0.0) == RAMP[0], shade(1.0) == RAMP[-1]
    (True, True)
    >>> shade(1 / 14)  # half way between the first two
    (212, 238, 186)
    """
    position = min(max(fraction, 0.0), 1.0) * (len(ramp) - 1)
    lower = min(int(position), len(ramp) - 2)
    weight = position - lower
    red, green, blue = (
        round(a + weight * (b - a)) for a, b in zip(ramp[lower], ramp[lower + 1], strict=True)
    )
    return red, green, blue


def ink_on(background: RGB) -> RGB:
    """Return the colour of text that reads well on a background.

    >>> ink_on(RAMP[0]) == DARK_INK, ink_on(RAMP[-1]) == LIGHT_INK
    (True, True)
    """
    red, green, blue = background
    luma = 0.299 * red + 0.587 * green + 0.114 * blue  # ITU-R BT.601
    return DARK_INK if luma > 112 else LIGHT_INK


def rank_shade(rank: int, maximum: int) -> RGB:
    """Return the colour of a rank: rank 1 is the least of the ramp, rank 0 is outside it.

    >>> rank_shade(0, 8) == NOTHING, rank_shade(1, 8) == RAMP[0], rank_shade(8, 8) == RAMP[-1]
    (True, True, True)
    """
    return shade((rank - 1) / max(maximum - 1, 1)) if rank > 0 else NOTHING


def difference_shade(difference: float, largest: float) -> RGB:
    """Return the colour of a difference: none is the middle of the diverging colours.

    >>> difference_shade(-3, 3) == DIVERGING[0], difference_shade(0, 3) == DIVERGING[4]
    (True, True)
    """
    return shade(0.5 + difference / (2 * largest), DIVERGING)


def hex_of(colour: RGB) -> str:
    """Return the colour as ``#rrggbb``.

    >>> hex_of((8, 29, 88))
    '#081d58'
    """
    return "#{:02x}{:02x}{:02x}".format(*colour)
