"""The benchmarks for GPUs and of growth run anywhere in a small form, and tell all they promise."""

import json
import runpy
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from rankflow.bench.trainee import PRESETS, Adapter

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def gpu():
    script = runpy.run_path(str(BENCHMARKS / "gpu.py"))
    app = typer.Typer()
    app.command()(script["main"])

    def run(*arguments):
        result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.output

    return run


def test_all_adapters_are_measured(gpu, tmp_path):
    record = tmp_path / "figures.json"
    out = gpu("--tiny", "--device", "cpu", "--rank", "4", "--rounds", "8", "--record", str(record))
    figures = json.loads(record.read_text())
    rows = {row["adapter"]: row for row in figures["rows"]}
    assert set(rows) == {adapter.value for adapter in Adapter}
    assert all(name in out for name in rows)
    assert "CPU" in figures["machine"]
    for row in rows.values():
        assert min(row["step_ms"], row["peak_mib"], row["tokens_per_second"]) > 0
        assert row["of_none"] == pytest.approx(1) or row["adapter"] != Adapter.NONE.value
    lora = rows[Adapter.PEFT_LORA.value]
    assert lora["of_lora"] == lora["peak_of_lora"] == lora["run_of_lora"] == 1
    for adapter in PRESETS:
        row = rows[adapter.value]
        assert min(row["scores_share"], row["event_steps"], row["sketched_steps"]) > 0
        assert row["run_of_lora"] > row["of_lora"]  # events are not for nothing


def test_growth_is_measured_and_predicted(monkeypatch, capsys):
    script = runpy.run_path(str(BENCHMARKS / "scale.py"))
    names = script["main"].__globals__
    point = script["Point"]
    small = [point(layers=1, rank=r, tokens=16) for r in (4, 8, 16)]
    small += [point(layers=2, rank=4, tokens=16)]
    for name, value in {
        "POINTS": small,
        "CALIBRATION": small[:3],
        "LAYERS": (1, 2),
        "SITES": (10, 100),
        "ROUNDS": 2,
        "keep_freed_memory": lambda: None,
    }.items():
        assert name in names
        monkeypatch.setitem(names, name, value)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    script["main"]()
    out = capsys.readouterr().out
    assert "GFLOP/s" in out
    assert out.count("%") >= 4 * 2 + 2 * 2 * 2 + 2
