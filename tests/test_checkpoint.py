import json
import math

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file

from rankflow.checkpoint import STATE_FILE, load_state, save_state
from rankflow.errors import CheckpointError
from rankflow.records import RankEvent

VALUES = {
    "budget": {"rank": 4.0},
    "total_steps": 9,
    "ranks": {"q": 2, "v": 0},
    "steps": 7,
    "observed": 7,
    "limit": 64,
    "magnitudes": [True, False],
    "young": [[30, 2], []],
    "ages": [3, 0],
    "demand": [0.1, 1e-300],
    "magnitude_ages": [1, 1],
    "promise": [0.0, 3.0],
    "history": [],
}


def make_state():
    event = RankEvent(0, 5, 64, 64, 32, {"q": 3}, {"q": 2}, {"q": math.inf}, (), (), 0.5)
    return VALUES | {
        "history": TypeAdapter(list[RankEvent]).dump_python([event], mode="json"),
        "scorer": {
            "sum": torch.randn(5),
            "by_column": torch.randn(4, 3).T,
            "generator": torch.Generator().manual_seed(3).get_state(),
            "empty": torch.zeros(0, 4),
        },
        "sketch": {"0.Y": torch.randn(3, 2), "count": torch.tensor(2.0)},
        "gated": {"q.B": torch.randn(4, 2), "q.gate": torch.zeros(2)},
    }


def test_a_state_reads_back_bit_for_bit(tmp_path):
    state = make_state()
    save_state(state, tmp_path)
    restored = load_state(tmp_path)
    for part in ("scorer", "sketch", "gated"):
        tensors, saved = restored.pop(part), state.pop(part)
        assert tensors.keys() == saved.keys()
        for key, tensor in saved.items():
            assert tensors[key].dtype == tensor.dtype
            assert torch.equal(tensors[key], tensor)
    assert restored == state


def test_a_state_without_tensors_reads_back(tmp_path):
    state = VALUES | {"scorer": {}, "sketch": {}, "gated": {}}
    save_state(state, tmp_path)
    assert load_state(tmp_path) == state


def test_saving_again_replaces_the_file_and_leaves_no_other(tmp_path):
    save_state(make_state() | {"steps": 1}, tmp_path)
    path = save_state(make_state() | {"steps": 2}, tmp_path)
    assert load_state(tmp_path)["steps"] == 2
    assert list(tmp_path.iterdir()) == [path]
    assert path.name == STATE_FILE


def test_a_failed_save_leaves_the_older_file_whole(tmp_path):
    save_state(make_state() | {"steps": 1}, tmp_path)
    with pytest.raises(TypeError):
        save_state(make_state() | {"steps": object()}, tmp_path)
    assert load_state(tmp_path)["steps"] == 1


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(CheckpointError, match=rf"holds no {STATE_FILE}.* resume from a checkpoint"):
        load_state(tmp_path)


@pytest.mark.parametrize("length", [0, 7, 100, -1])
def test_a_file_cut_short_is_refused(tmp_path, length):
    path = save_state(make_state(), tmp_path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(CheckpointError, match=r"is damaged .*resume from an older checkpoint"):
        load_state(tmp_path)


def test_a_damaged_header_is_refused(tmp_path):
    path = save_state(make_state(), tmp_path)
    content = bytearray(path.read_bytes())
    content[20:40] = b"\xff" * 20
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(tmp_path)


def test_slots_read_back_where_tensors_keep_their_shapes(tmp_path):
    state = make_state() | {"slots": [[3, 0], []]}
    save_state(state, tmp_path)
    assert load_state(tmp_path)["slots"] == [[3, 0], []]


@pytest.mark.parametrize(
    "slots",
    [[[1], []], [[1, 1], []], [[0, 1, 1], []], [[0, 1]], [[0, -1], []], [["0", 1], []]],
)
def test_slots_that_do_not_fit_the_ranks_are_refused(tmp_path, slots):
    save_state(make_state() | {"slots": slots}, tmp_path)
    with pytest.raises(CheckpointError, match="slots"):
        load_state(tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {"other": "{}"}, {"state": "{"}, {"state": json.dumps([1])}]
)
def test_a_safetensors_file_of_something_else_is_refused(tmp_path, metadata):
    save_file({"sum": torch.zeros(2)}, tmp_path / STATE_FILE, metadata=metadata)
    with pytest.raises(CheckpointError, match="is damaged"):
        load_state(tmp_path)
