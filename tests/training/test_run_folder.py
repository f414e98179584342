import json

import pytest

from rankflow.errors import SpecError
from rankflow.specs.budget import BudgetSpec
from rankflow.specs.run import DataSpec, ModelSpec, RunSpec
from rankflow.training.run_folder import SPEC_FILE, check_folder, start_folder, write_json


@pytest.fixture
def spec():
    return RunSpec(
        name="trial",
        model=ModelSpec(name="minilm", task="sequence-classification"),
        data=DataSpec(name="docstrings"),
        adapter={"r": 2},
        budget=BudgetSpec(rank=2),
        train={"output_dir": "unused"},
        seed=0,
    )


def test_the_resolved_spec_is_written_into_a_new_folder(tmp_path, spec):
    folder = tmp_path / "deep" / "run"
    assert start_folder(folder, spec) is None
    assert json.loads((folder / SPEC_FILE).read_text()) == spec.model_dump(mode="json")


def test_earlier_runs_are_moved_aside_and_kept(tmp_path, spec):
    folder = tmp_path / "run"
    for number in range(3):
        check_folder(folder)
        start_folder(folder, spec)
        write_json(folder / "number.json", number)
    kept = {
        path.name: json.loads((path / "number.json").read_text()) for path in tmp_path.iterdir()
    }
    assert kept == {"run.1": 0, "run.2": 1, "run": 2}


def test_an_empty_folder_is_used_as_it_is(tmp_path, spec):
    assert start_folder(tmp_path, spec) is None


@pytest.mark.parametrize("is_file", [True, False])
def test_what_no_run_wrote_is_refused_and_left_alone(tmp_path, is_file):
    taken = tmp_path / "thesis"
    if is_file:
        taken.write_text("chapter one")
    else:
        taken.mkdir()
        (taken / "chapter").write_text("one")
    with pytest.raises(SpecError, match=r"output_dir = '.*thesis': it exists and no run wrote it"):
        check_folder(taken)
    assert taken.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "metrics.json"
    write_json(path, {"accuracy": 0.5})
    with pytest.raises(TypeError):
        write_json(path, {"accuracy": object()})
    assert json.loads(path.read_text()) == {"accuracy": 0.5}
    assert list(tmp_path.iterdir()) == [path]
