"""Ranks that move and magnitudes together solve a problem that neither solves alone."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

_EXAMPLES = Path(__file__).parents[1] / "examples"
_SPEC = importlib.util.spec_from_file_location("planted_hybrid", _EXAMPLES / "planted_hybrid.py")
planted = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(planted)

SEEDS = [pytest.param(s, marks=[pytest.mark.slow] if s else []) for s in planted.SEEDS]


def _left(seed, name):
    left, flow = planted.train(seed, *planted.METHODS[name])
    assert flow.spent <= flow.limit == _budget()
    return left


def _budget():
    return planted.RANK * sum(n + m for n, m in planted.SHAPES)


@pytest.mark.parametrize("seed", SEEDS)
def test_each_part_alone_fails_and_the_hybrid_does_not(seed):
    assert _left(seed, "hybrid") < 0.05
    for part in ("uniform LoRA", "uniform DoRA", "dynamic LoRA"):
        assert _left(seed, part) > 0.2


@pytest.mark.parametrize("seed", planted.SEEDS)
def test_no_lora_of_that_budget_could_succeed_whatever_its_ranks(seed):
    problem = planted.Planted(seed)
    gains, costs = [], []
    for layer, truth in zip(problem.layers, problem.truths, strict=True):
        values = torch.linalg.svdvals((truth - layer.weight).double())  # Eckart and Young
        gains += (values.square() / len(truth)).tolist()
        costs += [sum(truth.shape)] * len(values)
    gains, costs = np.array(gains), np.array(costs)
    best_first = np.argsort(-gains / costs)
    paid = np.cumsum(costs[best_first]) - costs[best_first]
    bought = np.clip((_budget() - paid) / costs[best_first], 0, 1)  # of the last one, a part
    most = (gains[best_first] * bought).sum()
    assert gains.sum() == pytest.approx(problem.excess(), rel=1e-4)
    assert 1 - most / gains.sum() > 0.25


def test_the_budget_holds_all_magnitudes_and_the_true_ranks_and_not_one_component_more():
    magnitudes = sum(m for _, m in planted.SHAPES)
    costs = [n + m for n, m in planted.SHAPES]
    needed = magnitudes + sum(rank * costs[i] for i, rank in planted.TRUE_RANKS.items())
    assert needed <= _budget() < needed + min(costs[i] for i in planted.TRUE_RANKS)


def test_the_example_prints_every_method_with_its_difference_to_the_hybrid(monkeypatch, capsys):
    monkeypatch.setattr(planted, "STEPS", 10)
    monkeypatch.setattr(planted, "SEEDS", range(2))
    planted.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if "%" in line]
    assert [line.split("│")[1].strip() for line in lines] == list(planted.METHODS)
    assert lines[-1].split("│")[-2].strip() == "0.0% ± 0.0%"


def test_the_picture_shows_every_method(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(planted, "STEPS", 20)
    monkeypatch.setitem(sys.modules, "planted_hybrid", planted)
    picture = runpy.run_path(str(_EXAMPLES / "hybrid_picture.py"))
    picture["main"](str(tmp_path / "hybrid.png"))
    assert (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(planted.METHODS)[1:]
