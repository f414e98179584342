from itertools import pairwise

import matplotlib.pyplot
import numpy as np
import pytest

from rankflow.report import grid_figure
from rankflow.report.difference import Difference
from rankflow.report.grid_figure import render_pixels
from rankflow.report.heatmap import difference_heatmap, importance_heatmap, rank_heatmap
from rankflow.report.palette import BROKEN, DIVERGING, NOTHING, RAMP

LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BERT = ["self.query", "self.key", "attention.output.dense", "intermediate.dense", "output.dense"]
WHITE = (255, 255, 255)


def grid_of(layers, types, stack="layers"):
    return {f"{stack}.{i}.{t}": (3 * i + len(t)) % 9 for i in range(layers) for t in types}


MODELS = {
    "one site": {"classifier": 3},
    "6 layers": grid_of(6, BERT) | {"a_classifier_with_a_long_name": 2},
    "80 layers": grid_of(80, LLAMA),
    "two stacks": grid_of(12, BERT, "m.encoder.h") | grid_of(12, LLAMA, "m.decoder.h"),
    "experts": grid_of(8, [f"experts.{e}.{w}" for e in range(32) for w in ("w1", "w2")]),
}


def colour_at(figure, row, column):
    """Colour near the upper left corner of a cell, off its number."""
    pixels = render_pixels(figure)
    x, y = figure.axes[0].transData.transform((column + 0.12, row + 0.2))
    return tuple(int(channel) for channel in pixels[len(pixels) - 1 - round(y), round(x)])


def numbers_in(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_rank_0_and_rank_1_and_no_site_look_different():
    figure = rank_heatmap({"h.0.q": 0, "h.0.v": 1, "h.1.q": 8})
    assert colour_at(figure, 0, 0) == NOTHING
    assert colour_at(figure, 0, 1) == RAMP[0]
    assert colour_at(figure, 1, 0) == RAMP[-1]
    assert colour_at(figure, 1, 1) == WHITE
    assert legend_of(figure) == ["rank 0", "no adapter"]


def test_the_legend_names_only_what_the_figure_shows():
    assert legend_of(rank_heatmap({"h.0.q": 3, "h.0.v": 1, "lm_head": 2})) == []


def test_a_site_without_a_layer_fills_its_row():
    figure = rank_heatmap({"h.0.q": 1, "h.0.v": 1, "head": 8})
    assert colour_at(figure, 1.35, 0) == colour_at(figure, 1.35, 1) == RAMP[-1]


def test_figures_with_one_maximum_give_a_rank_one_colour():
    few, many = {"h.0.q": 4, "h.0.v": 1}, {"h.0.q": 4, "h.0.v": 16}
    shared = [colour_at(rank_heatmap(ranks, maximum=16), 0, 0) for ranks in (few, many)]
    assert shared[0] == shared[1]
    assert colour_at(rank_heatmap(few), 0, 0) == RAMP[-1]


def test_ranks_are_written_into_the_cells_unless_there_are_too_many(monkeypatch):
    ranks = {"h.0.q": 12, "h.0.v": 0, "h.1.q": 3}
    assert numbers_in(rank_heatmap(ranks)) == ["12", "0", "3"]
    monkeypatch.setattr(grid_figure, "MOST_TEXTS", 2)
    assert numbers_in(rank_heatmap(ranks)) == []


def test_importance_is_shown_on_a_logarithmic_scale():
    figure = importance_heatmap({"h.0.a": 1e-9, "h.0.b": 1e-2, "h.0.c": 1.0, "h.0.d": 100.0})
    below, bottom, middle, top = (colour_at(figure, 0, column) for column in range(4))
    assert below == bottom == RAMP[0]
    assert top == RAMP[-1]
    assert middle == pytest.approx(np.mean([RAMP[3], RAMP[4]], axis=0), abs=1)


def test_importance_per_parameter_can_turn_the_order_round():
    importance, costs = {"h.0.big": 4.0, "h.0.small": 2.0}, {"h.0.big": 400, "h.0.small": 2}
    whole = importance_heatmap(importance)
    assert colour_at(whole, 0, 0) == RAMP[-1]
    relative = importance_heatmap(importance, costs=costs)
    assert colour_at(relative, 0, 1) == RAMP[-1]
    assert relative.axes[1].get_ylabel() == "importance per parameter"


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), float("-inf")])
def test_importance_that_is_no_number_stands_out(worst):
    figure = importance_heatmap({"h.0.a": worst, "h.0.b": -1.0, "h.0.c": 1.0})
    assert colour_at(figure, 0, 0) == BROKEN
    assert colour_at(figure, 0, 1) == NOTHING
    assert colour_at(figure, 0, 2) == RAMP[-1]
    assert legend_of(figure) == ["none (≤ 0)", "not finite"]


@pytest.mark.parametrize("value", [0.0, 1e-200, 1e200])
def test_equal_importance_everywhere_can_be_drawn(value):
    figure = importance_heatmap({"h.0.a": value, "h.0.b": value})
    assert colour_at(figure, 0, 0) == (RAMP[-1] if value else NOTHING)


@pytest.mark.parametrize("ranks", MODELS.values(), ids=MODELS.keys())
def test_every_text_lies_on_the_page(ranks):
    figure = rank_heatmap(ranks, title="Rank, event 12, step 1,200")
    render_pixels(figure)
    grid, scale = figure.axes
    labels = [*grid.get_xticklabels(), *grid.get_yticklabels(), *scale.get_yticklabels()]
    for text in [*figure.texts, *figure.legends[0].get_texts(), *labels, scale.yaxis.label]:
        box = text.get_window_extent()
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text


@pytest.mark.parametrize("ranks", MODELS.values(), ids=MODELS.keys())
def test_no_label_runs_into_the_next_one_or_into_the_title(ranks):
    figure = rank_heatmap(ranks)
    render_pixels(figure)
    columns = [label.get_window_extent() for label in figure.axes[0].get_xticklabels()]
    rows = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(columns))
    assert all(upper.y0 > lower.y1 - 1 for upper, lower in pairwise(rows))
    assert figure.texts[0].get_window_extent().y0 > max(label.y1 for label in columns)


def test_drawing_registers_nothing_with_pyplot():
    before = matplotlib.pyplot.get_fignums()
    render_pixels(rank_heatmap(MODELS["6 layers"]))
    assert matplotlib.pyplot.get_fignums() == before


def test_the_resolution_scales_the_pixels():
    figure = rank_heatmap(MODELS["6 layers"])
    height, width, channels = render_pixels(figure, dots_per_inch=50).shape
    assert channels == 3
    assert render_pixels(figure, dots_per_inch=100).shape[:2] == pytest.approx(
        (2 * height, 2 * width), abs=2
    )


@pytest.mark.parametrize("ranks", MODELS.values(), ids=MODELS)
def test_a_dot_right_above_the_number_marks_each_trained_magnitude(ranks):
    magnitudes = {site: i % 3 == 0 for i, site in enumerate(ranks)}
    figure = rank_heatmap(ranks, magnitudes=magnitudes)
    axes = figure.axes[0]
    numbers = [text.get_position() for text in axes.texts]
    dotted = [number for number, on in zip(numbers, magnitudes.values(), strict=True) if on]
    for line, (x, y) in zip(axes.lines, dotted, strict=True):
        dot = line.get_xydata()[0]
        assert x < dot[0] < len(axes.get_xticks())
        assert y - 0.5 < dot[1] < y
    assert "magnitude" in legend_of(figure)


def test_no_dot_and_no_legend_where_no_magnitude_is_trained():
    figure = rank_heatmap({"h.0.q": 1, "h.0.v": 2}, magnitudes={"h.0.q": False, "h.0.v": False})
    assert not figure.axes[0].lines
    assert legend_of(figure) == []


def test_a_difference_has_signs_two_ends_of_colour_and_letters_for_unshared_sites():
    found = Difference(
        ranks={"h.0.q": -4, "h.0.v": 4, "h.1.q": 0},
        only_a={"h.1.v": 3},
        only_b={"head": 3},
        gained=frozenset({"h.0.q"}),
        lost=frozenset({"h.0.v"}),
    )
    figure = difference_heatmap(found)
    assert numbers_in(figure) == ["-4", "+4", "0", "A", "B"]
    assert colour_at(figure, 0, 0) == DIVERGING[0]
    assert colour_at(figure, 0, 1) == DIVERGING[-1]
    assert colour_at(figure, 1, 0) == DIVERGING[4]
    assert colour_at(figure, 1, 1) == NOTHING
    assert legend_of(figure) == ["in one only", "magnitude in B only", "in A only"]
    gained, lost = (line.get_markerfacecolor() for line in figure.axes[0].lines)
    assert (gained == "none", lost == "none") == (False, True)
