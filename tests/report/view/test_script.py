import json
import re
from importlib import resources

from rankflow.report import palette
from rankflow.report.view import script
from rankflow.report.view.script import view_script

FOLDER = resources.files("rankflow.report.view")
FILES = {path.name.removesuffix(".js") for path in FOLDER.iterdir() if path.name.endswith(".js")}


def test_every_file_is_part_of_the_script_behind_those_that_it_takes_from():
    assert set(script._PARTS) == FILES
    for place, part in enumerate(script._PARTS):
        source = FOLDER.joinpath(f"{part}.js").read_text("utf-8")
        taken = re.findall(r'from "\./(\w+)\.js"', source)
        assert set(taken) <= set(script._PARTS[:place]), part


def test_the_script_needs_no_other_file_and_no_network():
    text = view_script()
    assert not re.search(r"^\s*import\b|\bimport\(|@import|url\(", text, re.MULTILINE)
    assert re.findall(r"https?://[^\"]*", text) == ["http://www.w3.org/2000/svg"]
    assert re.findall(r"^export .*", text, re.MULTILINE) == ["export const { render } = main;"]


def test_the_script_makes_no_markup_of_texts():
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|eval\(", view_script())


def test_the_script_spreads_no_history_over_arguments():
    # Chromium's limit lies near 120,000 arguments; a history has more cells than that.
    assert not re.search(r"Math\.(max|min)\(\.\.\.", view_script())


def test_the_colours_of_cells_are_the_palettes():
    line = next(line for line in view_script().splitlines() if line.startswith("const COLOURS"))
    colours = json.loads(line.removeprefix("const COLOURS = ").removesuffix(";"))
    as_lists = [list(colour) for colour in palette.RAMP]
    assert colours["light"]["ramp"] == as_lists
    assert colours["dark"]["ramp"] == as_lists[::-1]
    assert colours["light"]["broken"] == list(palette.BROKEN)
