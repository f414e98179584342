import math

import numpy as np
import pytest

from rankflow.ablation.report.drawing.curves import CurveAxes, draw_curves
from rankflow.ablation.report.drawing.dots import DotPanel, draw_dots
from rankflow.ablation.report.drawing.forest import ForestLine, draw_forest, ratio_ticks
from rankflow.ablation.report.drawing.panels import Estimate, axis_limits
from rankflow.ablation.report.drawing.ranks import FinalRanks, draw_ranks
from rankflow.ablation.report.drawing.scatter import Price, draw_scatter
from rankflow.ablation.report.drawing.style import MOST_STYLES, as_png, style_methods
from rankflow.ablation.statistics.spread import spread
from rankflow.ablation.statistics.table import ScoreTable
from rankflow.ablation.statistics.verdict import compare_all

METHODS = ("lora", "dora", "hybrid")
AXES = CurveAxes("rank", {1.0: "1", 2.0: "2"}, "test NLL")


def points(line):
    return list(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_every_method_looks_different_until_styles_run_out():
    methods = [f"m{i}" for i in range(MOST_STYLES)]
    looks = {(s.colour, s.marker) for s in style_methods(methods).values()}
    assert len({colour for colour, _ in looks}) == MOST_STYLES
    assert len({marker for _, marker in looks}) == MOST_STYLES
    styles = style_methods([*methods, "a", "b"], first=["b"])
    assert styles["b"].listed
    assert not styles["a"].listed
    assert list(styles) == [*methods, "a", "b"]


def test_an_estimate_is_none_without_a_finite_score():
    assert Estimate.of(spread([math.nan])) is None
    assert Estimate.of(spread([1.0, math.nan])).hollow


def test_axes_hold_all_means_and_are_not_dwarfed_by_one_interval():
    estimates = [Estimate(1.0, 0.9, 1.1), Estimate(2.0, 1.9, 2.1), Estimate(1.5, -50.0, 53.0)]
    low, high = axis_limits(estimates)
    assert low < 0.9
    assert high > 2.1
    assert high - low < 5
    usual = [Estimate(1.0, 0.0, 2.0), Estimate(1.01, 0.01, 2.01)]
    low, high = axis_limits(usual)  # all are as wide, so all are shown
    assert low < 0.0
    assert high > 2.01
    low, high = axis_limits([Estimate(1.0, math.nan, math.nan)], also=[3.0])
    assert low < 1.0
    assert high > 3.0


def test_curves_pass_through_their_means_in_order_of_the_budget():
    curves = {"lora": {2.0: Estimate(0.4, 0.3, 0.5), 1.0: Estimate(0.6, 0.5, 0.7, hollow=True)}}
    figure = draw_curves({"clinc": curves}, style_methods(METHODS), AXES)
    (panel,) = figure.axes
    assert panel.get_title(loc="left") == "clinc"
    assert panel.get_xscale() == "log"
    drawn = [points(line) for line in panel.get_lines()]
    assert [(1.0, 0.6), (2.0, 0.4)] in drawn
    assert [(1.0, 0.5), (1.0, 0.7)] in drawn
    faces = [line.get_markerfacecolor() for line in panel.get_lines() if len(line.get_xdata()) == 1]
    assert faces == ["white", style_methods(METHODS)["lora"].colour]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["lora"]


def test_means_that_span_decades_get_a_logarithmic_axis():
    curves = {"lora": {1.0: Estimate(0.5, -1, 1)}, "dora": {1.0: Estimate(0.001, -1, 1)}}
    (panel,) = draw_curves({"planted": curves}, style_methods(METHODS), AXES).axes
    assert panel.get_yscale() == "log"
    low, high = panel.get_ylim()
    assert low < 0.001
    assert high > 0.5


def test_panels_beyond_the_tasks_are_off():
    curves = {"lora": {1.0: Estimate(0.5, 0.4, 0.6)}}
    figure = draw_curves(dict.fromkeys("abcd", curves), style_methods(METHODS), AXES)
    assert [panel.axison for panel in figure.axes] == [True] * 4 + [False] * 2


def comparisons(effects):
    rng = np.random.default_rng(0)
    values = {}
    for task in ("clinc", "wordnet"):
        for seed in range(8):
            values["lora", task, seed] = float(np.exp(rng.normal(0, 0.01)))
            for method, effect in effects.items():
                values[method, task, seed] = float(
                    values["lora", task, seed] * np.exp(effect + rng.normal(0, 0.01))
                )
    table = ScoreTable(values, "test NLL", relative=True)
    return compare_all(table, [(method, "lora") for method in effects], margin=0.01)


def test_a_forest_has_a_diamond_for_each_comparison_at_its_mean():
    found = comparisons({"hybrid": -0.05, "dora": 0.05})
    lines = [ForestLine(f"{c.ours} - {c.theirs}", c, whole=True) for c in found]
    figure = draw_forest({"rank 1": lines}, higher_is_better=False)
    (panel,) = figure.axes
    diamonds = [line for line in panel.get_lines() if line.get_marker() == "D"]
    assert [line.get_xdata()[0] for line in diamonds] == [c.mean for c in found]
    colours = [line.get_color() for line in diamonds]
    assert colours[0] != colours[1]  # better and worse
    ends = [tuple(line.get_xdata()) for line in panel.get_lines()]
    assert (found[0].low, found[0].high) in ends
    low, high = panel.get_xlim()
    assert low < -0.05
    assert high > 0.05
    assert panel.get_xlabel().startswith("← ours is better")
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["hybrid - lora", "dora - lora"]
    names = {text.get_text() for text in figure.legends[0].get_texts()}
    assert names == {"better", "worse", "within the margin"}


def test_the_sides_of_a_forest_follow_the_metric():
    (found,) = comparisons({"hybrid": -0.05})
    line = ForestLine("hybrid - lora", found, whole=True)
    (panel,) = draw_forest({"rank 1": [line]}, higher_is_better=True).axes
    assert panel.get_xlabel().startswith("← ours is worse")


@pytest.mark.parametrize(("low", "high"), [(-0.1, 0.03), (-0.002, 0.002), (-0.4, 0.5)])
def test_ticks_of_ratios_are_round_per_cents_within_the_axis(low, high):
    places, labels = ratio_ticks(low, high)
    assert len(places) >= 3
    assert all(low <= place <= high for place in places)
    for place, label in zip(places, labels, strict=True):
        assert math.expm1(place) * 100 == pytest.approx(float(label.rstrip("%")), abs=1e-9)


def test_a_panel_of_dots_has_a_row_for_each_method_and_a_reference():
    panel = DotPanel({"lora": Estimate(0.8, 0.7, 0.9), "hybrid": Estimate(0.82, 0.8, 0.84)}, 0.85)
    figure = draw_dots(
        [[("clinc", panel)]], style_methods(METHODS), label="similarity", reference="base model"
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["lora", "hybrid"]
    drawn = [points(line) for line in axes.get_lines()]
    assert [(0.8, 0)] in drawn
    assert [(0.82, 1)] in drawn
    assert axes.get_lines()[0].get_xdata() == [0.85, 0.85]
    low, high = axes.get_xlim()
    assert low < 0.8
    assert high > 0.85


def test_a_price_is_a_point_with_a_cross_where_merging_brings_it():
    prices = {
        "lora": Price(Estimate(0.5, 0.4, 0.6), unmerged=1.2, merged=1.0),
        "hybrid": Price(Estimate(0.4, 0.3, 0.5), unmerged=1.3, merged=None),
    }
    figure = draw_scatter(
        [[("clinc", prices), ("empty", {})]], style_methods(METHODS), price="latency", metric="NLL"
    )
    first, second = figure.axes
    drawn = [points(line) for line in first.get_lines()]
    assert [(1.2, 0.5)] in drawn
    assert [(1.3, 0.4)] in drawn
    crosses = [points(line) for line in first.get_lines() if line.get_marker() == "x"]
    assert crosses == [[(1.0, 0.5)]]
    assert second.texts[0].get_text() == "not measured"
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["lora", "hybrid", "merged"]


def test_heatmaps_stand_side_by_side_and_break_into_lines():
    ranks = {f"layers.{layer}.query": layer for layer in range(4)}
    one = draw_ranks([FinalRanks("hybrid", ranks, {})])
    three = draw_ranks([FinalRanks("hybrid", ranks, {})] * 3)
    many = draw_ranks([FinalRanks("hybrid", ranks, {})] * 12)
    assert three.get_figwidth() == pytest.approx(3 * one.get_figwidth())
    assert three.get_figheight() == one.get_figheight()
    assert many.get_figheight() > one.get_figheight()
    assert many.get_figwidth() <= 10.5
    assert as_png(one).startswith(b"\x89PNG")
