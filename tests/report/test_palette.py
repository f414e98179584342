from itertools import pairwise

import numpy as np

from rankflow.report.palette import BROKEN, NOTHING, RAMP, ink_on, rank_shade, shade


def luminance(colour):
    """Relative luminance of WCAG 2.1."""
    channels = np.array(colour) / 255
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def test_more_is_always_darker():
    ramp = [luminance(shade(fraction)) for fraction in np.linspace(0, 1, 50)]
    assert all(above > below for above, below in pairwise(ramp))


def test_text_contrasts_with_every_colour():
    colours = [*(shade(fraction) for fraction in np.linspace(0, 1, 50)), NOTHING, BROKEN]
    for colour in colours:
        lighter, darker = sorted((luminance(colour), luminance(ink_on(colour))), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 3  # WCAG's least for graphics


def test_values_outside_the_scale_take_its_nearer_end():
    assert shade(-1) == RAMP[0]
    assert shade(2) == RAMP[-1]


def test_every_rank_up_to_the_maximum_has_a_colour_of_its_own():
    assert len({rank_shade(rank, 16) for rank in range(17)}) == 17


def test_a_scale_of_one_rank_still_tells_it_from_none():
    assert rank_shade(1, 1) != rank_shade(0, 1)
