"""What the benchmark on paper says of the goals that need no clock."""

import runpy
from pathlib import Path

import pytest

from rankflow.bench.shapes import LLAMA3_8B, TINY
from rankflow.bench.trainee import Adapter

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "on_paper.py"


@pytest.fixture(scope="module")
def on_paper():
    return runpy.run_path(str(SCRIPT))


@pytest.mark.parametrize("rank", [8, 128])
def test_a_hybrid_run_in_bf16_holds_less_than_pefts_lora(rank, on_paper):
    lora, hybrid = (
        on_paper["count"](LLAMA3_8B, 1, adapter, rank)
        for adapter in (Adapter.PEFT_LORA, Adapter.HYBRID)
    )
    assert hybrid.peak <= lora.peak


def test_layers_are_stacked(on_paper):
    one, two, three = (on_paper["count"](TINY, n, Adapter.DORA, 4) for n in (1, 2, 3))
    stacked = one.stacked(two, 3)
    assert stacked.seconds == pytest.approx(three.seconds, rel=0.02)  # norms are one launch each
    assert stacked.peak == pytest.approx(three.peak, rel=0.05)


def test_the_tables_are_drawn(on_paper, monkeypatch, capsys):
    for name, value in {"SHAPES": (TINY,), "RANKS": (4,), "TOKENS": 16}.items():
        monkeypatch.setitem(on_paper["main"].__globals__, name, value)
    on_paper["main"]()
    out = capsys.readouterr().out
    assert all(adapter.value in out for adapter in on_paper["ADAPTED"])
