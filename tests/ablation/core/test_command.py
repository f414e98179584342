import json

import pytest
from typer.testing import CliRunner

from rankflow.ablation.methods.registry import METHODS
from rankflow.ablation.worker import CellRunner
from rankflow.cli import app


@pytest.fixture
def ablate(planted, tmp_path, monkeypatch):
    """Run ``rankflow ablate`` on the planted ablation, in this process."""
    planted()  # writes the spec
    monkeypatch.chdir(tmp_path)

    def run(*arguments, spec="tiny.toml"):
        command = ["ablate", *([spec] if spec else []), *arguments]
        return CliRunner(env={"COLUMNS": "200"}).invoke(app, command)

    return run


@pytest.fixture
def untrained(monkeypatch):
    """Make it an error to run a cell."""

    def run(*_):
        raise AssertionError("a cell ran")

    monkeypatch.setattr(CellRunner, "run", run)


HERE = ("--executor", "here", "--set", 'methods=["lora", "hybrid"]')


def test_a_run_keeps_its_results_and_reports_them(ablate, tmp_path):
    first = ablate(*HERE)
    assert first.exit_code == 0, first.output
    assert first.output.count("(validation): excess") == 4
    assert first.output.count("(test): excess") == 4
    assert "Verdict" in first.output
    assert {path.name for path in (tmp_path / "ablations/tiny").iterdir()} == {
        "report.md",
        "report.html",
        "figures",
    }
    lines = (tmp_path / "ablations/results.jsonl").read_text().splitlines()
    assert len(lines) == 8
    assert all(json.loads(line)["status"] == "done" for line in lines)
    written = (tmp_path / "ablations/tiny/report.md").read_bytes()
    again = ablate(*HERE)
    assert "(test)" not in again.output  # nothing ran twice
    assert (tmp_path / "ablations/tiny/report.md").read_bytes() == written


def test_a_dry_run_shows_sizes_and_numbers_of_cells_and_trains_nothing(ablate, untrained):
    shown = ablate("--dry-run", "--set", 'methods=["lora", "hybrid", "oft", "prompt"]')
    assert shown.exit_code == 0, shown.output
    assert "about 24 cells, 0 of which have run" in shown.output
    rows = {line.split()[3]: line for line in shown.output.splitlines() if "planted" in line}
    assert set(rows) == {"lora", "hybrid", "oft", "prompt"}
    assert f"{2 * (528 + 512):,}" in rows["lora"]  # inputs and outputs of all layers
    assert "100%" in rows["lora"]
    assert "cannot run" in rows["prompt"]


def test_a_dry_run_is_given_to_a_script(ablate, untrained):
    shown = ablate("--dry-run", "--set", 'methods=["lora", "hybrid", "prompt", "oft"]', "--json")
    assert shown.exit_code == 0, shown.output
    plan = json.loads(shown.stdout)
    assert (plan["cells"], plan["ended"]) == (24, 0)
    places = {planned["place"]["method"]: planned for planned in plan["places"]}
    assert places["lora"]["parameters"] == 2 * (528 + 512)
    assert places["lora"]["share"] == 1
    assert places["prompt"]["parameters"] is None
    assert "embedding" in places["prompt"]["obstacle"]
    assert places["oft"]["size_name"]
    assert "about 24 cells" in shown.stderr


def test_what_was_measured_is_given_to_a_script(ablate, untrained, tmp_path):
    shown = ablate("--report-only", "--set", 'methods=["lora", "hybrid"]', "--json")
    found = json.loads(shown.stdout)
    assert found["html"] == "ablations/tiny/report.html"
    assert [row["place"]["method"] for row in found["methods"]] == ["lora", "hybrid"]
    assert found["methods"][0]["quality"]["mean"] is None  # nothing has run
    assert "Verdict" in shown.stderr


def test_a_report_can_be_made_of_what_there_is_without_running(ablate, untrained, tmp_path):
    shown = ablate("--report-only", "--report", "words")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "words/report.md").is_file()
    assert "not complete" not in shown.output


def test_only_what_is_asked_for_runs_and_what_it_lacks_is_told(ablate):
    shown = ablate("--executor", "here", "--only", "frozen")
    assert shown.exit_code == 0, shown.output
    assert (
        "planted/rank 2/frozen-pattern is not complete: it retrains the ranks of 'hybrid', of "
        "which no run with seed 100 has finished"
    ) in shown.output
    assert "(test)" not in shown.output


def test_what_failed_runs_again_when_asked_to(ablate, monkeypatch, planted):
    only = ("--executor", "here", "--only", "lora", "--set", "tuning.enabled=false")
    with monkeypatch.context() as patch:
        patch.setattr(CellRunner, "workload", lambda *_: 1 / 0)
        failed = ablate(*only)
    assert failed.exit_code == 0
    assert failed.output.count("failed: ZeroDivisionError: division by zero (test_command.py") == 2
    assert "(test)" not in ablate(*only).output
    assert ablate(*only, "--retry").output.count("(test): excess") == 2


def test_results_can_be_kept_at_a_url_and_their_report_here(ablate, tmp_path):
    shown = ablate(*HERE, "--set", "tuning.enabled=false", "--out", "memory://ablations")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "ablations/tiny/report.md").is_file()
    assert {path.name for path in tmp_path.iterdir()} >= {"tiny.toml", "ablations"}
    assert not (tmp_path / "memory:").exists()
    assert not (tmp_path / "unused").exists()


def test_all_methods_are_listed_with_their_sources(ablate):
    listed = ablate("--list", spec=None)
    assert listed.exit_code == 0
    assert all(name in listed.output for name in METHODS)
    assert "2405.17357" in listed.output


def test_the_methods_are_given_to_a_script(ablate):
    listed = ablate("--list", "--json", spec=None)
    assert listed.exit_code == 0
    assert json.loads(listed.stdout) == {name: m.summary for name, m in METHODS.items()}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--set", "budgets=[]"), "budgets = []"),
        (("--set", 'methods=["lroa"]', "--set", "compare=[]"), "did you mean 'lora'?"),
        (("--only", "nothing"), "matches no task/budget/method"),
        (("--only", "["), "is no regular expression"),
        (("--executor", "here", "--workers", "2"), "use --executor processes"),
        (("--out", "nowhere://x"), "name a folder"),
    ],
)
def test_what_is_wrong_ends_with_a_message_and_exit_code_2(ablate, untrained, arguments, expected):
    shown = ablate(*arguments)
    assert shown.exit_code == 2
    assert expected in " ".join(shown.output.split())
    assert "Traceback" not in shown.output


def test_a_spec_must_be_named_and_be_there(ablate):
    missing = ablate(spec="none.toml")
    assert (missing.exit_code, "cannot be read" in missing.output) == (2, True)
    unnamed = ablate(spec=None)
    assert (unnamed.exit_code, "use --list" in unnamed.output) == (2, True)
