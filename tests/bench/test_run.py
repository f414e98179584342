import io
import json

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from rankflow.adapters.sites import find_sites
from rankflow.bench import run
from rankflow.bench.cases import CASES, choose_cases
from rankflow.bench.contestant import Contestant, Method
from rankflow.bench.models import build
from rankflow.bench.run import run_bench
from rankflow.cli import app

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _leave_the_allocator(monkeypatch):
    monkeypatch.setattr(run, "keep_freed_memory", lambda: None)


@pytest.fixture(params=[case.name for case in CASES])
def case(request):
    if request.param == "nf4-layer":
        pytest.importorskip("bitsandbytes")
    return choose_cases([request.param], tiny=True)[0]


def test_a_model_is_the_same_at_every_call(case):
    first, second = build(case, CPU), build(case, CPU)
    assert torch.equal(first.loss(first.model.eval()), second.loss(second.model.eval()))


def test_methods_start_from_the_same_function_and_learn(case):
    losses = {}
    for method in Method:
        contestant = Contestant(case, method, CPU)
        workload = build(case, CPU)
        before = workload.loss(contestant.model.eval()).item()
        for _ in range(10):
            assert contestant.time_step() > 0
        losses[method] = before, workload.loss(contestant.model.eval()).item()
    starts, ends = zip(*losses.values(), strict=True)
    assert max(starts) - min(starts) <= 0.01 * max(starts)
    assert all(end < start for start, end in losses.values())
    assert ends[1] == pytest.approx(ends[2], rel=0.01)  # both are DoRA


def test_only_ours_is_fast_dora(case):
    kinds = {}
    for method in Method:
        model = Contestant(case, method, CPU).model
        kinds[method] = {
            type(variant).__module__
            for site in find_sites(model)
            for variant in site.layer.lora_variant.values()
        }
    assert kinds == {
        Method.LORA: set(),
        Method.DORA: {"peft.tuners.lora.variants"},
        Method.OURS: {"rankflow.adapters.dora"},
    }


def test_every_case_is_measured(case):
    out = Console(file=io.StringIO(), width=140)
    (measurement,) = run_bench([case], console=out, rounds=1)
    assert set(measurement.step) == set(measurement.peak) == set(Method)
    assert min(measurement.step.values()) > 0
    assert min(measurement.peak.values()) > 0
    assert measurement.inference_ratio > 0
    assert (measurement.merged_ratio is None) == (case.shape == "nf4")
    text = out.file.getvalue()
    assert case.name in text
    assert f"{measurement.step_ratio[Method.DORA]:.2f}x" in text


def test_contestants_take_turns_and_the_first_turns_do_not_count():
    calls = []

    def act(name):
        def note():
            calls.append(name)
            return float(len(calls))

        return note

    seconds = run._take_turns([act("a"), act("b")], 2)
    assert calls == ["a", "b"] * (run.WARM_UP + 2)
    assert seconds == [[5.0, 7.0], [6.0, 8.0]]


def test_a_ratio_is_the_median_of_the_ratios_within_turns():
    assert run._ratio([2.0, 30.0, 400.0], [1.0, 10.0, 1.0]) == 3.0


def test_the_command_measures_the_case_it_is_given(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    result = CliRunner().invoke(app, ["bench", "--quick", "--case", "minilm-r8", "--rounds", "1"])
    assert result.exit_code == 0
    assert "minilm-r8" in result.stdout
    assert "llama" not in result.stdout


def test_the_command_gives_its_measurements_to_a_script():
    result = CliRunner().invoke(
        app, ["bench", "--quick", "--case", "minilm-r8", "--rounds", "1", "--json"]
    )
    (measured,) = json.loads(result.stdout)["measurements"]
    assert measured["case"]["name"] == "minilm-r8"
    assert set(measured["peak"]) == {"LoRA", "DoRA", "ours"}
    assert "Ratios are ours over theirs" in result.stderr


def test_the_command_refuses_an_unknown_case():
    result = CliRunner().invoke(app, ["bench", "--case", "llama-r33"])
    assert result.exit_code == 2
    assert "llama-r32" in result.stderr
