"""Every example runs, and says what it promises."""

import runpy
from pathlib import Path

import pytest

from rankflow.specs.run import load_run

EXAMPLES = Path(__file__).parents[1] / "examples"


def _run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_custom_loop_ends_as_a_stock_adapter_of_equal_outputs(capsys):
    _run("custom_loop.py")
    out = capsys.readouterr().out
    assert out.count("pruned") > 5
    difference = float(out.split("differs by at most")[1])
    assert difference <= 1e-5


def test_the_callback_prunes_a_trainers_model_to_its_budget(capsys):
    _run("trainer_callback.py")
    first = next(line for line in capsys.readouterr().out.splitlines() if "reallocations" in line)
    events, rest = first.split(" reallocations, ")
    spent, limit = (int(n.replace(",", "")) for n in rest.split(" parameters")[0].split(" of "))
    assert int(events) > 3
    assert spent <= limit


def test_a_diffusion_models_dora_is_loaded_by_diffusers_with_equal_outputs(monkeypatch, capsys):
    pytest.importorskip("diffusers")
    example = runpy.run_path(str(EXAMPLES / "diffusers_dora.py"))
    monkeypatch.setitem(example["main"].__globals__, "STEPS", 40)
    example["main"]()
    *events, ranks, difference = capsys.readouterr().out.splitlines()
    assert all("pruned" in event for event in events)
    assert float(ranks.split("loss")[1]) < 0.6
    assert float(difference.split("differs by at most")[1]) <= 1e-5


def test_the_quickstarts_run_spec_loads():
    assert load_run(EXAMPLES / "quickstart" / "run.toml").budget.target


def test_the_picture_shows_what_is_needed_and_every_method(monkeypatch, tmp_path, capsys):
    picture = runpy.run_path(str(EXAMPLES / "hybrid_picture.py"))
    monkeypatch.setitem(picture["train"].__globals__, "STEPS", 20)
    picture["main"](str(tmp_path / "hybrid.png"))
    assert (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(picture["METHODS"])


def test_no_example_is_longer_than_120_lines():
    long = [p.name for p in EXAMPLES.glob("*.py") if len(p.read_text().splitlines()) > 120]
    assert long == []
