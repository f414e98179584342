"""Ablations that run in moments: the planted teacher for a few steps, and tiny models of text."""

import gc
import importlib.util
import json
from pathlib import Path

import pytest

from rankflow.ablation.executors import HereExecutor
from rankflow.ablation.provenance import trace
from rankflow.ablation.records import CellResult, RankHistory, RankMoment
from rankflow.ablation.run import Ablation
from rankflow.ablation.store import Store
from rankflow.ablation.worker import CellRunner
from rankflow.specs.ablation import load_ablation


def _load_tiny_models():
    path = Path(__file__).parents[2] / "training" / "conftest.py"
    spec = importlib.util.spec_from_file_location("tiny_models", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_TINY = _load_tiny_models()
WORDS = _TINY.WORDS
bert_folder, llama_folder = _TINY.bert_folder, _TINY.llama_folder
caches_in_a_temporary_folder = _TINY.caches_in_a_temporary_folder

PLANTED = """
methods = ["lora", "hybrid", "frozen-pattern"]
budgets = [2]
seeds = 2
judge = "excess"
compare = [["hybrid", "lora"]]
[tuning]
rates = [0.02, 0.04]
widest = 1
[adapter]
r = 4
lora_alpha = 4
[train]
max_steps = 3
per_device_train_batch_size = 8
[tasks.planted.teacher]
rows = 64
"""

TEXTS = """
methods = ["lora"]
budgets = [2]
seeds = 1
tuning = { enabled = false }
[adapter]
r = 4
lora_alpha = 4
[data]
train = "rows.jsonl"
validation = "validation.jsonl"
test = "test.jsonl"
max_length = 16
[train]
max_steps = 3
per_device_train_batch_size = 4
[tasks.encoder.model]
name = "bert"
task = "sequence-classification"
pooling = "mean"
"""


@pytest.fixture(scope="session", autouse=True)
def fast_collection():
    """Spare every cell's garbage collection all that the imports made."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def planted(tmp_path):
    """Load the planted ablation, with overrides."""

    def load(*overrides):
        path = tmp_path / "tiny.toml"
        path.write_text(PLANTED)
        return load_ablation(path, overrides)

    return load


@pytest.fixture
def texts(tmp_path, bert_folder):
    """Load an ablation on a tiny encoder and rows of different lengths, with overrides."""
    words = ("good", "bad", "fine", "poor")
    rows = [
        {"text": f"{words[i % 4]}" + " a" * (1 + i % 7) + " film", "label": ["yes", "no"][i % 2]}
        for i in range(32)
    ]
    for name in ("rows", "validation", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def load(*overrides):
        path = tmp_path / "texts.toml"
        path.write_text(TEXTS)
        return load_ablation(path, overrides)

    return load


@pytest.fixture
def result_of():
    """Make the result of a cell without running it."""

    def make(cell, digest="0" * 12, status="done", metrics=None, **fields):
        if status != "done":
            return CellResult(cell, status, trace(digest), reason="why")
        ranks = RankHistory(("a", "b"), (RankMoment(0, 9, (1, 2)),))
        fields = {"metrics": metrics or {"excess": 0.5}, "ranks": ranks, **fields}
        return CellResult(cell, status, trace(digest), **fields)

    return make


@pytest.fixture
def ablation_in(tmp_path):
    """Open an ablation in a folder of results, loaded."""

    def open_in(spec, folder="out", only="", retry=False):
        ablation = Ablation(spec, Store(str(tmp_path / folder)), only)
        ablation.load(retry=retry)
        return ablation

    return open_in


@pytest.fixture
def here():
    """An executor in this process."""
    return lambda spec: HereExecutor(CellRunner(spec))


@pytest.fixture
def measured():
    """Reduce results to what does not depend on the clock or on where they ran."""

    def reduce(results):
        return {
            r.cell: (r.status, r.reason, r.metrics, r.parameters, r.ranks, r.forgetting)
            for r in results
        }

    return reduce
