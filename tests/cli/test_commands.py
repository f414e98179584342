import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from rankflow.cli import app
from rankflow.errors import SpecError
from rankflow.records import ComponentChange, RankEvent
from rankflow.report.events import EventLog
from rankflow.specs.budget import list_budgets, load_budget

RUN = """
[model]
name = "minilm"
task = "sequence-classification"
[data]
name = "docstrings"
[budget]
preset = "fixed"
"""
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def run_file(tmp_path):
    path = tmp_path / "try.toml"
    path.write_text(RUN)
    return path


@pytest.fixture
def adapter(tmp_path):
    """A folder with two layers of q and v, at ranks 3, 1, 2, and none at the last v."""
    shapes = {}
    for site, rank in (("0.q", 3), ("0.v", 1), ("1.q", 2)):
        shapes[f"base_model.model.layers.{site}.lora_A.weight"] = (rank, 7)
        shapes[f"base_model.model.layers.{site}.lora_B.weight"] = (5, rank)
    folder = tmp_path / "adapter"
    folder.mkdir()
    weights = {key: np.zeros(shape, np.float32) for key, shape in shapes.items()}
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "rank_pattern": {"0.q": 3, "0.v": 1}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def run_folder(tmp_path):
    """A folder with the log of 12 events."""
    folder = tmp_path / "run"
    log = EventLog(folder / "events.jsonl")
    change = ComponentChange("layers.0.q", 0, 0.5, "lowest score")
    for index in range(12):
        ranks = {"layers.0.q": 4, "layers.1.q": index}
        log(
            RankEvent(
                index, 100 * index, 54321, 9000, 8000 + index, ranks, ranks, {}, (change,), (), 0.1
            )
        )
    return folder


def test_help_lists_the_commands_and_imports_no_torch():
    code = (
        "import sys\n"
        "from typer.testing import CliRunner\n"
        "from rankflow.cli import app\n"
        "print(CliRunner().invoke(app, ['--help']).output)\n"
        "print('loaded:', sorted({'torch', 'transformers', 'peft', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    for command in ("train", "plan", "inspect", "compress", "budgets"):
        assert f"│ {command} " in result.stdout
    assert "loaded: []" in result.stdout


@pytest.mark.parametrize(
    ("command", "module", "function"),
    [("train", "rankflow.training.run", "train"), ("plan", "rankflow.training.plan", "plan_run")],
)
def test_a_run_is_loaded_with_its_overrides_and_handed_on(
    command, module, function, run_file, monkeypatch
):
    seen = []

    def receive(run, *, console, **_):
        seen.append(run)
        console.print("done")

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: receive}))
    result = run_command(command, run_file, "--set", "budget.rank=2", "--set", "seed=5")
    assert (result.exit_code, result.output) == (0, "done\n")
    assert [(run.budget.rank, run.seed) for run in seen] == [(2, 5)]


@pytest.mark.parametrize("command", ["train", "plan"])
def test_a_faulty_run_ends_with_its_faults_on_stderr_and_code_2(command, run_file):
    result = run_command(command, run_file, "--set", "budget.rnk=2", "--set", "data.nme=[x]")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        f"error: run '{run_file}' with overrides: 2 faults\n"
        '  data.nme = "[x]"\n'
        "    unknown key; did you mean 'name'?\n"
        "  budget.rnk = 2\n"
        "    unknown key; did you mean 'rank'?\n"
    )


def test_debug_shows_the_traceback():
    result = run_command("--debug", "budgets", "show", "adalra")
    assert isinstance(result.exception, SpecError)
    assert result.exception.__traceback__ is not None


def test_an_unexpected_error_keeps_its_traceback(monkeypatch):
    def break_down():
        raise ZeroDivisionError

    monkeypatch.setattr("rankflow.specs.budget.list_budgets", break_down)
    assert isinstance(run_command("budgets", "list").exception, ZeroDivisionError)


def test_budgets_are_listed_within_80_columns():
    result = run_command("budgets", "list")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    first_words = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert first_words == ["preset", *list_budgets()]
    assert " ".join(load_budget("fixed").description.split()[:3]) in result.stdout


def test_a_budget_is_shown_as_a_file_to_start_from(tmp_path):
    result = run_command("budgets", "show", "adalora")
    (tmp_path / "mine.toml").write_text(result.stdout)
    assert load_budget(tmp_path / "mine.toml") == load_budget("adalora")
    assert result.stdout.startswith("# adalora: ")


def test_an_unknown_budget_is_refused_with_the_closest_one():
    result = run_command("budgets", "show", "adalra")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "no such preset; did you mean 'adalora'?" in result.stderr


def test_an_adapter_is_inspected(adapter):
    result = run_command("inspect", adapter)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[:4] == [
        ["site", "rank", "scale", "DoRA", "parameters"],
        ["layers.0.q", "3", "2", "no", "36"],
        ["layers.0.v", "1", "6", "no", "12"],
        ["layers.1.q", "2", "3", "no", "24"],
    ]
    assert ["0", "3", "1", "48"] in rows
    assert ["1", "2", "·", "24"] in rows
    assert "3 sites, 72 parameters, and 0 beside them" in result.stdout
    assert "PEFT cannot load" not in result.stdout


@pytest.mark.parametrize(("trained", "is_told"), [(60, True), (72, False), (None, False)])
def test_an_adapter_tells_what_was_trained_where_it_stores_more(trained, is_told, adapter):
    (adapter / "rankflow.json").write_text(json.dumps({"trained_parameters": trained}))
    words = " ".join(run_command("inspect", adapter).stdout.split())
    assert ("The file holds 72 parameters and 60 are trained" in words) is is_told


def test_an_adapter_whose_configuration_has_other_ranks_is_called_out(adapter):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    words = " ".join(run_command("inspect", adapter).stdout.split())
    assert (
        "PEFT cannot load it: other ranks than its config at layers.0.q (3, not 2), "
        "layers.0.v (1, not 2)"
    ) in words


def test_a_run_is_inspected_by_its_last_events(run_folder):
    result = run_command("inspect", run_folder)
    assert result.exit_code == 0
    rows = [line.split() for line in result.stdout.splitlines()]
    assert rows[0] == ["event", "step", "budget", "spent", "ranks", "pruned", "born"]
    assert [row[0] for row in rows[1:11]] == [str(index) for index in range(2, 12)]
    assert rows[10] == ["11", "1,100", "54,321", "8,011", "4-11", "1", "0"]
    assert ["1", "11"] in rows[11:]


@pytest.mark.parametrize("folder", ["adapter", "run_folder"])
def test_the_heatmap_is_written_on_request(folder, request, tmp_path):
    file = tmp_path / "ranks.png"
    result = run_command("inspect", request.getfixturevalue(folder), "--png", file)
    assert result.exit_code == 0
    assert f"Heatmap written to {file}" in result.stdout
    assert file.read_bytes().startswith(PNG_SIGNATURE)


def read_json(result):
    """What a script would read, which is all of stdout."""
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_an_adapter_is_inspected_by_a_script(adapter):
    result = run_command("inspect", adapter, "--json")
    found = read_json(result)
    assert [(site["name"], site["rank"]) for site in found["sites"]] == [
        ("layers.0.q", 3),
        ("layers.0.v", 1),
        ("layers.1.q", 2),
    ]
    assert (found["other_parameters"], found["trained_parameters"]) == (0, None)
    assert "3 sites, 72 parameters" in result.stderr


def test_all_events_of_a_run_are_given_to_a_script(run_folder):
    events = read_json(run_command("inspect", run_folder, "--json"))["events"]
    assert [event["index"] for event in events] == list(range(12))
    assert events[-1]["ranks"] == {"layers.0.q": 4, "layers.1.q": 11}
    assert events[-1]["pruned"][0]["site"] == "layers.0.q"


def test_budgets_are_given_to_a_script():
    presets = read_json(run_command("budgets", "list", "--json"))
    assert list(presets) == list(list_budgets())
    assert presets["adalora"] == read_json(run_command("budgets", "show", "adalora", "--json"))
    assert presets["adalora"] == load_budget("adalora").model_dump(mode="json")


def test_what_libraries_print_does_not_reach_a_script(run_file, monkeypatch):
    def receive(run, *, console, resume):
        print("a library speaks")
        console.print("done")
        return {"loss": float("nan"), "folder": Path("out")}

    monkeypatch.setitem(sys.modules, "rankflow.training.run", SimpleNamespace(train=receive))
    result = run_command("train", run_file, "--json")
    assert read_json(result) == {"loss": None, "folder": "out"}
    assert result.stderr == "a library speaks\ndone\n"


def test_an_error_leaves_stdout_empty_for_a_script(tmp_path):
    result = run_command("inspect", tmp_path, "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")


def test_a_folder_that_is_neither_run_nor_adapter_is_refused(tmp_path):
    result = run_command("inspect", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {tmp_path} holds neither adapter_config.json nor events.jsonl; "
        "name the folder of an adapter or a run\n"
    )


def test_a_run_without_events_is_refused(tmp_path):
    (tmp_path / "events.jsonl").touch()
    result = run_command("inspect", tmp_path)
    assert result.exit_code == 2
    assert "holds no event yet; look again after the first one" in result.stderr


def test_the_ranks_of_two_folders_are_compared(adapter, run_folder, tmp_path):
    file = tmp_path / "difference.png"
    result = run_command("inspect", "--diff", run_folder, adapter, "--png", file)
    assert result.exit_code == 0, result.output
    rows = [line.split() for line in result.stdout.splitlines()]
    assert ["0", "-1", "B"] in rows
    assert ["1", "-9", "·"] in rows
    assert "only in B: layers.0.v (rank 1)" in result.stdout
    assert file.read_bytes().startswith(PNG_SIGNATURE)


def test_a_script_gets_the_difference_as_json(adapter, run_folder):
    shown = read_json(run_command("inspect", "--diff", run_folder, adapter, "--json"))
    assert shown == {
        "ranks": {"layers.0.q": -1, "layers.1.q": -9},
        "only_a": {},
        "only_b": {"layers.0.v": 1},
        "gained": [],
        "lost": [],
    }


@pytest.mark.parametrize("arguments", [(), ("here", "--diff", "a", "b")])
def test_inspect_wants_one_folder_or_two_to_compare(arguments):
    result = run_command("inspect", *arguments)
    assert result.exit_code == 2
    assert result.stderr == "error: name one folder, or two of them behind --diff\n"


def test_a_run_is_reported_in_its_folder_or_elsewhere(run_folder, tmp_path):
    other = tmp_path / "other.html"
    for options, path in (((), run_folder / "report.html"), (("--output", other), other)):
        result = run_command("report", run_folder, *options)
        assert result.exit_code == 0, result.output
        assert f"{path} is written; open it in a browser" in result.stdout
        assert '"layers.1.q"' in path.read_text(encoding="utf-8")


def test_a_report_may_hold_another_run_to_compare_with(run_folder, tmp_path):
    other = run_folder.rename(tmp_path / "second")
    log = EventLog(tmp_path / "first" / "events.jsonl")
    log(RankEvent(0, 100, 9, 9, 9, {"head": 1}, {"head": 1}, {}, (), (), 0.1))
    result = run_command("report", tmp_path / "first", "--compare", other)
    assert result.exit_code == 0, result.output
    page = (tmp_path / "first" / "report.html").read_text(encoding="utf-8")
    assert page.index('"name":"first"') < page.index('"name":"second"')


def test_a_report_of_no_run_is_refused(tmp_path):
    result = run_command("report", tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"error: {tmp_path} holds no events.jsonl; name the folder of a run\n"


def test_a_command_misspelt_is_refused_with_the_closest_one():
    result = run_command("trian")
    assert result.exit_code == 2
    assert "Did you mean 'train'" in result.stderr


@pytest.fixture
def trained_adapter(adapter):
    """The adapter with numbers in it."""
    shapes = load_file(adapter / "adapter_model.safetensors")
    draw = np.random.default_rng(0)
    weights = {key: draw.normal(size=v.shape).astype(np.float32) for key, v in shapes.items()}
    save_file(weights, adapter / "adapter_model.safetensors")
    return adapter


def test_compress_writes_an_adapter_a_curve_and_a_budget(trained_adapter, tmp_path):
    small, png, ranks = tmp_path / "small", tmp_path / "curve.png", tmp_path / "ranks.toml"
    result = run_command(
        "compress",
        *(trained_adapter, "--params", 40, "--output", small, "--png", png, "--ranks", ranks),
    )
    assert result.exit_code == 0, result.output
    assert "uniform ranks" in result.output
    assert "36 of 72 parameters (50%) at a relative error of" in result.output
    assert png.read_bytes().startswith(PNG_SIGNATURE)
    weights = load_file(small / "adapter_model.safetensors")
    assert sum(tensor.size for tensor in weights.values()) == 36
    budget = load_budget(ranks)
    assert (budget.policy, budget.params) == ("frozen", 36)
    assert sum(budget.frozen_rank_of(f"layers.{site}") for site in ("0.q", "0.v", "1.q")) == 3


@pytest.mark.parametrize(
    "target", [("--budget", "40"), ("--budget", "hybrid", "--params", "40"), ("--rank", "1.12")]
)
def test_compress_takes_its_budget_in_several_ways(target, trained_adapter, tmp_path):
    result = run_command("compress", trained_adapter, *target, "--output", tmp_path / "small")
    assert "36 of 72 parameters" in result.output, result.output


def test_a_compression_is_given_to_a_script(trained_adapter, tmp_path):
    result = run_command(
        "compress", trained_adapter, "--params", 40, "--output", tmp_path / "s", "--json"
    )
    found = read_json(result)
    assert (found["parameters"], found["parameters_before"]) == (36, 72)
    assert found["curve"][-1]["parameters"] == 72
    assert "36 of 72 parameters" in result.stderr


def test_compress_finds_the_smallest_adapter_for_an_error(trained_adapter, tmp_path):
    result = run_command("compress", trained_adapter, "--error", 0, "--output", tmp_path / "s")
    assert "72 of 72 parameters (100%) at a relative error of 0.0000" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "say how much may be left"),
        (("--rank", 1, "--error", 0.1), "--rank and --error each say how much may be left"),
        (("--budget", "hybrid", "--error", 0.1), "--error takes the place of a budget"),
        (("--budget", "40", "--params", 40), "--params and --budget each say"),
        (("--params", 400), "is more than the 72 that the adapter has"),
        (("--params", 3), "buys no component"),
        (("--budget", "hybird"), "did you mean 'hybrid'?"),
    ],
)
def test_compress_refuses_what_makes_no_sense(options, message, trained_adapter, tmp_path):
    result = run_command("compress", trained_adapter, *options, "--output", tmp_path / "small")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "small").exists()


def test_compress_of_a_missing_adapter_says_so(tmp_path):
    result = run_command("compress", tmp_path / "no", "--rank", 1, "--output", tmp_path / "small")
    assert result.exit_code == 2
    assert "is no folder here, and cannot be fetched from the hub" in result.stderr
