import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankflow.report.layout import lay_out, shortest_beginnings, shortest_endings

BERT = [
    "attention.self.query",
    "attention.self.key",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
]
SEGMENTS = st.sampled_from(["a", "b", "layers", "0", "1", "2", "12"])
NAMES = st.lists(SEGMENTS, min_size=1, max_size=5).map(".".join)
PATHS = st.lists(st.lists(SEGMENTS, min_size=1, max_size=4).map(tuple), min_size=1, unique=True)


def place_of(grid, site):
    cell = grid.cells[site]
    return grid.rows[cell.row], grid.columns[cell.column]


def test_a_decoder_has_a_row_for_each_layer_and_a_column_for_each_type():
    names = [f"model.layers.{i}.{t}" for i in range(3) for t in ("self_attn.q_proj", "mlp.up_proj")]
    grid = lay_out(names)
    assert grid.rows == ("0", "1", "2")
    assert grid.columns == ("q_proj", "up_proj")
    assert place_of(grid, "model.layers.2.mlp.up_proj") == ("2", "up_proj")


def test_two_stacks_are_two_groups_of_rows_named_by_what_tells_them_apart():
    names = [f"model.{stack}.layers.{i}.fc1" for stack in ("encoder", "decoder") for i in range(2)]
    grid = lay_out(names)
    assert grid.rows == ("encoder 0", "encoder 1", "decoder 0", "decoder 1")
    assert grid.groups == (0, 0, 1, 1)


def test_layers_stand_in_the_order_of_their_numbers_and_columns_in_that_of_appearance():
    grid = lay_out(["h.10.z", "h.9.a", "h.2.z", "h.10.a"])
    assert grid.rows == ("2", "9", "10")
    assert grid.columns == ("z", "a")


def test_column_labels_are_short_and_still_tell_the_types_apart():
    grid = lay_out([f"encoder.layer.0.{name}" for name in BERT])
    assert grid.columns == (
        "query",
        "key",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
    )


def test_sites_without_a_layer_have_rows_of_their_own_above_or_below():
    grid = lay_out(
        ["embeddings.word_embeddings", "layer.0.q", "layer.0.v", "pooler.q", "classifier"]
    )
    assert grid.rows == ("word_embeddings", "0", "pooler.q", "classifier")
    assert grid.groups == (0, 1, 2, 3)
    assert [grid.cells[name].span for name in ("classifier", "layer.0.v")] == [2, 1]


def test_only_the_first_number_is_the_layer():
    grid = lay_out(["layers.0.mlp.experts.3.w1", "layers.0.mlp.experts.11.w1"])
    assert grid.rows == ("0",)
    assert grid.columns == ("experts.3.w1", "experts.11.w1")
    unet = lay_out(["down_blocks.0.resnets.1.conv1", "mid_block.resnets.0.conv1"])
    assert unet.rows == ("down_blocks 0", "mid_block 0")


@pytest.mark.parametrize("names", [["classifier"], ["0", "2"], ["net.0", "net.2"]])
def test_a_grid_without_types_has_one_nameless_column(names):
    grid = lay_out(names)
    assert grid.columns == ("",)
    assert [(grid.cells[n].column, grid.cells[n].span) for n in names] == [(0, 1)] * len(names)


@given(st.lists(NAMES, min_size=1, unique=True))
def test_no_two_sites_share_a_place_and_every_row_and_column_has_a_site(names):
    grid = lay_out(names)
    # "01" and "1" would be one layer to int(); no strategy above makes them.
    places = {
        (cell.row, column)
        for cell in grid.cells.values()
        for column in range(cell.column, cell.column + cell.span)
    }
    assert len(places) == sum(cell.span for cell in grid.cells.values())
    assert {row for row, _ in places} == set(range(len(grid.rows)))
    assert {column for _, column in places} == set(range(len(grid.columns)))


@given(PATHS)
def test_shortened_paths_stay_distinct_parts_of_their_paths(paths):
    endings = shortest_endings(paths)
    assert len(set(endings)) == len(paths)
    assert all(".".join(p).endswith(label) for p, label in zip(paths, endings, strict=True))
    assert len(set(shortest_beginnings(paths))) == len(paths)
