from itertools import combinations
from pathlib import Path

import matplotlib.pyplot
import numpy as np
import pytest

from rankflow.analysis.checkpoints import Checkpoint
from rankflow.analysis.correlation import Correlation, Estimate
from rankflow.analysis.directions import Change
from rankflow.analysis.figure import change_scatter
from rankflow.analysis.points import Point, Run
from rankflow.report.grid_figure import render_pixels
from rankflow.report.layout import lay_out
from rankflow.report.palette import RAMP, hex_of

FOUND = Correlation(24, 6, Estimate(-0.312, -0.5, -0.1), Estimate(0.0, -0.1, 0.1))
NONE = Correlation(24, 6, None, None, "dD or dM is constant")


def make_run(name="dora", *, layers=6, steps=(10, 20, 30), size=1.0, kinds=("query", "value")):
    random = np.random.default_rng(0)
    sites = tuple(f"encoder.layer.{i}.attention.{kind}" for i in range(layers) for kind in kinds)
    points = [
        Point(site, moment, Change(*(size * random.uniform(0.01, 0.03, 2)), norm=1.0))
        for moment in range(len(steps))
        for site in sites
    ]
    moments = tuple(Checkpoint(Path(name), "adapter", step) for step in steps)
    return Run(name, Path(name), moments, sites, tuple(points))


def draw(*runs, found=FOUND, title="Change of magnitude and direction"):
    layout = lay_out(dict.fromkeys(site for run in runs for site in run.sites))
    return change_scatter(runs, [found] * len(runs), layout, title=title)


def panels_of(figure):
    return [axes for axes in figure.axes if axes.get_visible() and axes.get_title(loc="left")]


def legend_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_every_point_is_drawn_where_it_belongs():
    run = make_run()
    (panel,) = panels_of(draw(run))
    drawn = [tuple(line.get_xydata()[0]) for line in panel.lines]
    assert drawn == [(point.change.dD, point.change.dM) for point in run.points]


def test_colours_tell_layers_and_markers_tell_checkpoints():
    run = make_run()
    (panel,) = panels_of(draw(run))
    looks = {
        (point.site.split(".")[2], point.moment): (line.get_markerfacecolor(), line.get_marker())
        for point, line in zip(run.points, panel.lines, strict=True)
    }
    assert looks["0", 0][0] == hex_of(RAMP[0])
    assert looks["5", 2][0] == hex_of(RAMP[-1])
    for (layer, moment), (colour, marker) in looks.items():
        assert colour == looks[layer, 0][0]
        assert marker == looks["0", moment][1]
    assert len({marker for _, marker in looks.values()}) == 3
    assert len({colour for colour, _ in looks.values()}) == 6


def test_each_panel_tells_its_correlation():
    for found, text in ((FOUND, "r = -0.31 [-0.50, -0.10], 24 points"), (NONE, NONE.reason)):
        (panel,) = panels_of(draw(make_run(), found=found))
        assert text in panel.texts[0].get_text()


@pytest.mark.parametrize(("size", "is_shared"), [(1.0, True), (0.2, False)])
def test_runs_share_their_axes_unless_one_would_be_a_speck(size, is_shared):
    figure = draw(make_run("lora"), make_run("full", size=size))
    first, second = panels_of(figure)
    assert (first.get_xlim() == second.get_xlim()) is is_shared
    assert (first.get_ylim() == second.get_ylim()) is is_shared
    assert ("its own scale" in figure.get_suptitle()) is not is_shared


def test_a_weight_that_has_not_moved_is_a_cross_at_the_origin():
    run = make_run()
    still = Point(run.sites[0], 0, Change(0.0, 0.0, norm=1.0))
    figure = draw(Run(run.name, run.folder, run.moments, run.sites, (*run.points, still)))
    line = panels_of(figure)[0].lines[-1]
    assert (line.get_marker(), line.get_xydata().tolist()) == ("x", [[0, 0]])
    assert legend_of(figure)[-1] == "has not moved"


def test_a_point_without_a_direction_is_not_drawn():
    run = make_run()
    lost = Point(run.sites[0], 0, Change(1.0, None, norm=0.0, zero_rows=5))
    figure = draw(Run(run.name, run.folder, run.moments, run.sites, (*run.points, lost)))
    assert len(panels_of(figure)[0].lines) == len(run.points)


@pytest.mark.parametrize(
    ("steps", "legend"),
    [
        ([(10, 20), (10, 20, None)], ["step 10", "step 20", "end"]),
        ([(10, 20), (15, 30)], []),
        ([tuple(range(1, 30))], []),
    ],
)
def test_markers_are_explained_where_they_can_be(steps, legend):
    runs = [make_run(f"run {i}", steps=moments) for i, moments in enumerate(steps)]
    assert legend_of(draw(*runs)) == legend


CASES = {
    "one": [make_run()],
    "four": [make_run(name) for name in ("full", "lora", "dora", "hybrid")],
    "five, own scales": [
        make_run(f"experiments/minilm/clinc150/{i}", size=5.0**i) for i in range(5)
    ],
    "80 layers, eight checkpoints": [
        make_run(layers=80, steps=tuple(range(1000, 9000, 1000)), kinds=("q",), size=1e-4)
    ],
}


def shown_labels(axis):
    """The labels of an axis's ticks that lie within its limits."""
    low, high = sorted(axis.get_view_interval())
    return [
        label
        for label, place in zip(axis.get_ticklabels(), axis.get_ticklocs(), strict=False)
        if low <= place <= high
    ]


def texts_of(figure):
    yield figure._suptitle
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        if axes.get_visible():
            yield from (axes._left_title, *axes.texts, axes.xaxis.label, axes.yaxis.label)
            yield from (*shown_labels(axes.xaxis), *shown_labels(axes.yaxis))


@pytest.mark.parametrize("runs", CASES.values(), ids=CASES)
@pytest.mark.parametrize("found", [FOUND, NONE], ids=["found", "none"])
def test_every_text_lies_on_the_page_and_on_no_other(runs, found):
    figure = draw(*runs, found=found, title="Change of magnitude and direction\n[01].*query$")
    render_pixels(figure)
    boxes = [(t.get_text(), t.get_window_extent()) for t in texts_of(figure) if t.get_text()]
    assert len(boxes) > 15
    for text, box in boxes:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= figure.bbox.x1, text
        assert box.y1 <= figure.bbox.y1, text
    for (one, a), (other, b) in combinations(boxes, 2):
        assert not a.overlaps(b), (one, other)


def test_drawing_registers_nothing_with_pyplot():
    before = matplotlib.pyplot.get_fignums()
    render_pixels(draw(make_run()))
    assert matplotlib.pyplot.get_fignums() == before
