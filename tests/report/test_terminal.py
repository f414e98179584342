from io import StringIO

import pytest
from rich.console import Console

from rankflow.report.terminal import rank_table
from rankflow.report.text_grid import ABSENT

LLAMA = [f"attn.{name}_proj" for name in "qkvo"] + [f"mlp.{n}_proj" for n in ("gate", "up", "down")]
LARGE = {f"model.layers.{i}.{t}": (i + 3 * len(t)) % 13 for i in range(80) for t in LLAMA}


def printed(renderable, **options):
    console = Console(file=StringIO(), width=80, **options)
    console.print(renderable)
    return console.file.getvalue()


def words_of(renderable):
    return [line.split() for line in printed(renderable).splitlines()]


def backgrounds(table):
    return {
        table.plain[span.start : span.end].strip(): span.style.bgcolor.name
        for span in table.spans
        if span.style.bgcolor
    }


def test_every_rank_of_80_layers_stands_in_80_columns():
    table = rank_table(LARGE)
    lines = words_of(table)
    assert lines[0] == [name.split(".")[1] for name in LLAMA]
    for layer, line in enumerate(lines[1:]):
        ranks = [LARGE[f"model.layers.{layer}.{name}"] for name in LLAMA]
        assert [int(word) for word in line] == [layer, *ranks]
    assert max(map(len, table.plain.splitlines())) <= 80


def test_a_wide_grid_is_cut_into_bands_that_fit():
    ranks = {f"layers.{i}.expert_{e:02}": i + e for i in range(2) for e in range(30)}
    table = rank_table(ranks, costs=ranks, width=60)
    assert max(map(len, table.plain.splitlines())) <= 60
    lines = words_of(table)
    heads = [word for line in lines for word in line if word.startswith("expert")]
    assert heads == [f"expert_{e:02}" for e in range(30)]
    first_layer = [line[1:-1] for line in lines if line and line[0] == "0"]
    assert [int(word) for words in first_layer for word in words] == list(range(30))


def test_an_absent_site_is_a_dot_and_an_empty_one_a_zero():
    lines = words_of(rank_table({"h.0.q": 0, "h.0.v": 1, "h.1.q": 2}))
    assert lines == [["q", "v"], ["0", "0", "1"], ["1", "2", ABSENT]]


def test_ranks_0_and_1_and_the_largest_differ_in_colour():
    colours = backgrounds(rank_table({"h.0.q": 0, "h.0.v": 1, "h.1.q": 9}))
    assert colours.keys() == {"0", "1", "9"}
    assert len(set(colours.values())) == 3


def test_without_colour_only_text_is_left():
    table = rank_table({"h.0.q": 0, "h.0.v": 1})
    coloured = printed(table, force_terminal=True, color_system="truecolor")
    assert "\x1b[38;2;" in coloured
    assert "\x1b" not in printed(table)


def test_labels_of_several_parts_are_set_one_below_the_other():
    names = ["attention.output.dense", "output.dense", "query"]
    lines = words_of(rank_table({f"layer.0.{name}": 1 for name in names}))
    assert lines[:3] == [["attention"], ["output", "output"], ["dense", "dense", "query"]]


def test_stacks_are_set_apart_by_an_empty_line():
    ranks = {"m.encoder.0.fc": 1, "m.decoder.0.fc": 2, "head": 3}
    assert words_of(rank_table(ranks)) == [
        ["fc"],
        ["encoder", "0", "1"],
        [],
        ["decoder", "0", "2"],
        [],
        ["head", "3"],
    ]


def test_each_line_ends_with_what_its_sites_cost():
    costs = {"h.0.q": 1000, "h.0.v": 234, "h.1.q": 7, "head": 5_000_000}
    lines = words_of(rank_table(dict.fromkeys(costs, 1), costs=costs))
    assert [line[-1] for line in lines if line] == ["parameters", "1,234", "7", "5,000,000"]


@pytest.mark.parametrize("length", [24, 25])
def test_a_long_label_loses_its_beginning(length):
    name = "embed_" + "x" * (length - 7) + "y"
    label = words_of(rank_table({name: 1}))[-1][0]
    assert len(label) == 24
    assert label.endswith("xy")
    assert label.startswith("…") == (length > 24)


def test_a_dot_behind_a_rank_marks_a_trained_magnitude():
    ranks = {"h.0.q": 10, "h.0.v": 0, "h.1.q": 3, "h.1.v": 7}
    magnitudes = {"h.0.q": True, "h.0.v": True, "h.1.q": False, "h.1.v": False}
    lines = rank_table(ranks, magnitudes=magnitudes).plain.split("\n")
    assert [line.split() for line in lines[1:]] == [["0", "10•", "0•"], ["1", "3", "7"]]
    assert len({len(line) for line in lines[1:]}) == 1
