from pathlib import Path

import pytest

from rankflow.analysis.checkpoints import find_checkpoints, name_runs
from rankflow.errors import RankFlowError

ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
MODEL = ("config.json", "model.safetensors")


def fill(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()


def found(folder):
    return [
        (str(checkpoint.folder.relative_to(folder)), checkpoint.content, checkpoint.label)
        for checkpoint in find_checkpoints(folder)
    ]


@pytest.mark.parametrize(("files", "content"), [(ADAPTER, "adapter"), (MODEL, "model")])
def test_a_run_has_its_checkpoints_by_their_steps_and_its_end(files, content, tmp_path):
    for step in (1000, 9, 200):
        fill(tmp_path / f"checkpoint-{step}", files)
    fill(tmp_path, files)
    assert found(tmp_path) == [
        ("checkpoint-9", content, "step 9"),
        ("checkpoint-200", content, "step 200"),
        ("checkpoint-1000", content, "step 1,000"),
        (".", content, "end"),
    ]


def test_a_run_of_rankflow_ends_in_its_adapter(tmp_path):
    fill(tmp_path / "checkpoint-10", ADAPTER)
    fill(tmp_path / "adapter", ADAPTER)
    fill(tmp_path, ["run.json", "events.jsonl"])
    assert [row[0] for row in found(tmp_path)] == ["checkpoint-10", "adapter"]


@pytest.mark.parametrize("weights", ["model.safetensors.index.json", "pytorch_model.bin"])
def test_models_in_parts_or_in_the_older_format_are_models(weights, tmp_path):
    fill(tmp_path, ["config.json", weights])
    assert found(tmp_path) == [(".", "model", "end")]


def test_a_checkpoint_by_itself_has_its_step(tmp_path, monkeypatch):
    folder = tmp_path / "checkpoint-30"
    fill(folder, [*ADAPTER, "config.json"])
    assert found(folder) == [(".", "adapter", "step 30")]
    monkeypatch.chdir(folder)
    assert find_checkpoints(Path("."))[0].step == 30


def test_folders_without_weights_are_passed_over(tmp_path):
    fill(tmp_path / "checkpoint-10", ["optimizer.pt"])
    fill(tmp_path / "checkpoint-best", ADAPTER)
    fill(tmp_path / "checkpoint-20", ADAPTER)
    assert [row[0] for row in found(tmp_path)] == ["checkpoint-20"]


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_a_folder_without_weights_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RankFlowError, match=r"holds no weights.*name the folder of a run"):
        find_checkpoints(tmp_path / name)


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["runs/dora", "runs/lora"], ["dora", "lora"]),
        (["a/dora", "b/dora"], ["a/dora", "b/dora"]),
        (["runs/dora/adapter"], ["dora/adapter"]),
        (["runs/dora/checkpoint-5"], ["dora/checkpoint-5"]),
        (["runs/dora", "runs/dora/"], ["dora", "dora"]),
        (["/"], ["/"]),
    ],
)
def test_runs_are_named_by_what_tells_them_apart(folders, names):
    assert name_runs([Path(folder) for folder in folders]) == names
