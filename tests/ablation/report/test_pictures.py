import io
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from rankflow.ablation.report.contents import verdicts_of
from rankflow.ablation.report.document import Picture
from rankflow.ablation.report.pictures import picture_blocks
from rankflow.ablation.report.rows import gather, method_row


def pictures(spec, results):
    gathered = gather(spec, results)
    rows = {place: method_row(gathered, place) for place in gathered.tests}
    blocks = picture_blocks(gathered, rows, *verdicts_of(gathered))
    return {block.name: block for block in blocks if isinstance(block, Picture)}


def ink(picture):
    """Share of pixels that are not white."""
    pixels = imread(io.BytesIO(picture.png), format="png")[..., :3]
    return float(np.mean(np.any(pixels < 0.99, axis=-1)))


@pytest.fixture
def small(draw):
    return draw(ranks=(1, 2), seeds=2, planted=True)


def test_every_figure_is_drawn_and_none_is_empty(small):
    found = pictures(small.spec, small.results())
    assert list(found) == [
        "quality",
        "comparisons",
        "price",
        "forgetting-similarity",
        "recovery",
        "ranks-clinc-rank-1",
        "ranks-clinc-rank-2",
        "ranks-wordnet-rank-1",
        "ranks-wordnet-rank-2",
    ]
    assert all(ink(picture) > 0.01 for picture in found.values())
    assert all(picture.caption.endswith(".") for picture in found.values())


def test_curves_need_two_budgets(draw):
    scenario = draw(ranks=(2,), tasks={"clinc": 0.5}, seeds=2)
    assert "quality" not in pictures(scenario.spec, scenario.results())


def test_without_comparisons_there_is_no_figure_of_them(draw):
    scenario = draw(ranks=(2,), tasks={"clinc": 0.5}, seeds=2, compare=())
    assert "comparisons" not in pictures(scenario.spec, scenario.results())


def test_without_results_there_are_no_figures(small):
    assert pictures(small.spec, []) == {}


def test_a_single_seed_and_diverged_runs_can_be_drawn(draw, change):
    scenario = draw(ranks=(1, 2), tasks={"clinc": 0.5}, seeds=1)
    results = change(scenario.results(), "lora", value=math.nan)
    found = pictures(scenario.spec, results)
    assert all(ink(picture) > 0.01 for picture in found.values())
    assert "comparisons" in found  # hybrid against dora is left


def test_static_ranks_are_no_figure(draw):
    scenario = draw(methods={"lora": 0.0, "dora": -0.1}, compare=(), interaction=None, seeds=1)
    assert not any(name.startswith("ranks") for name in pictures(scenario.spec, scenario.results()))


def test_more_methods_than_colours_are_drawn_in_grey(draw):
    methods = {f"method-{i}": 0.1 * i for i in range(14)}
    scenario = draw(
        methods=methods, tasks={"clinc": 0.5}, ranks=(1, 2), seeds=2, compare=(), interaction=None
    )
    quality = pictures(scenario.spec, scenario.results())["quality"]
    assert ink(quality) > 0.01
    assert quality.caption.endswith("Grey, without intervals: methods beyond the first 10.")


def test_budgets_in_parameters_are_an_axis_too(draw):
    scenario = draw(ranks=(1, 2), tasks={"clinc": 0.5}, seeds=2)
    first, second = scenario.spec.budgets
    budgets = (first.model_copy(update={"rank": None, "params": 10_000}), second)
    spec = scenario.spec.model_copy(update={"budgets": budgets})
    results = [
        replace(r, cell=replace(r.cell, budget="10,000 parameters"))
        if r.cell.budget == "rank 1"
        else r
        for r in scenario.results()
    ]
    found = pictures(spec, results)
    assert ink(found["quality"]) > 0.01
    assert "ranks-clinc-10000-parameters" in found
