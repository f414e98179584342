import io

from rich.console import Console

from rankflow.records import CurvePoint
from rankflow.report.curve import curve_table, draw_curve

POINTS = [CurvePoint(40 * i, (1 - i / 24) ** 2, 1 - i / 24) for i in range(1, 25)]


def test_the_table_ends_with_the_whole_adapter_and_has_a_dozen_lines():
    out = io.StringIO()
    Console(file=out, width=80).print(curve_table(POINTS, 960))
    heading, *lines = out.getvalue().splitlines()
    assert heading.split() == ["parameters", "of", "before", "error", "uniform", "ranks"]
    assert len(lines) == 12
    assert lines[-1].split() == ["960", "100%", "0.0000", "0.0000"]
    assert lines[5].split() == ["480", "50%", "0.2500", "0.5000"]


def test_the_figure_holds_both_curves_and_what_was_kept():
    figure = draw_curve(POINTS, whole=960, parameters=480, error=0.25)
    even, chosen, here = figure.axes[0].lines
    assert list(even.get_ydata()) == [point.uniform_error for point in POINTS]
    assert list(chosen.get_ydata()) == [point.error for point in POINTS]
    assert (list(here.get_xdata()), list(here.get_ydata())) == ([0.5], [0.25])
    assert "480 parameters" in here.get_label()
