import pytest
import torch
from torch.nn import functional
from typer.testing import CliRunner

import rankflow as rf
from rankflow.cli import app
from rankflow.errors import RankFlowError
from rankflow.export.compress_folder import compress_folder
from rankflow.export.inspect import inspect_adapter
from rankflow.specs.run import load_run
from rankflow.training.adapter import add_adapter
from rankflow.training.calibration import load_calibration, read_by_run
from rankflow.training.data import load_data
from rankflow.training.models import load_base_model
from rankflow.training.pooling import pool

RUN = """
name = "trial"

[model]
name = "{model}"
task = "{task}"

[data]
train = "{rows}"
max_length = 16

[adapter]
r = 4
use_dora = true

[budget]
preset = "fixed"
rank = 3

[train]
output_dir = "{folder}"
max_steps = 6
per_device_train_batch_size = 4
learning_rate = 1e-2
save_strategy = "no"
use_cpu = true
"""


@pytest.fixture
def trained(tmp_path, write_rows, sentiment_rows, bert_folder, llama_folder):
    """Make a tiny adapter for a run spec; returns the spec's file and the adapter."""

    def make(task="causal-lm", pooling=None):
        path = tmp_path / "run.toml"
        text = RUN.format(
            model=llama_folder if task == "causal-lm" else bert_folder,
            task=task,
            rows=write_rows("rows.jsonl", sentiment_rows),
            folder=tmp_path / "out",
        )
        if pooling is not None:
            text = text.replace("[data]", f'pooling = "{pooling}"\n[data]')
        path.write_text(text)
        save_adapter(load_run(path, ()), tmp_path / "adapter")
        return path, tmp_path / "adapter"

    return make


def save_adapter(spec, folder):
    """Let stock PEFT save what a run of the spec could have trained."""
    labels = load_data(spec.data, spec.model.task).labels
    model = add_adapter(load_base_model(spec.model, labels), spec.model, spec.adapter)
    for name, parameter in model.named_parameters():
        if ".lora_A" in name or ".lora_B" in name:
            parameter.data = 0.2 * torch.randn_like(parameter)
    model.save_pretrained(folder)


def compress(*arguments):
    return CliRunner().invoke(app, ["compress", *map(str, arguments)])


@pytest.mark.parametrize("pooling", ["mean", "model"])
def test_the_loss_is_the_one_that_the_run_trains(trained, pooling):
    path, adapter = trained("sequence-classification", pooling)
    found = load_calibration(load_run(path, ()), adapter)
    batch = found.batches[0]
    features = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        logits = found.model(**features).logits
        if pooling == "mean":
            logits = pool(logits, batch["attention_mask"], "mean")
        expected = functional.cross_entropy(logits, batch["labels"])
        torch.testing.assert_close(found.loss(batch), expected)


def test_the_rows_are_the_same_every_time_in_batches_of_one_size(trained):
    path, adapter = trained()
    first, again = (load_calibration(load_run(path, ()), adapter) for _ in range(2))
    assert len(first.batches) == 4  # of the 18 rows that validation leaves, two are left over
    for one, other in zip(first.batches, again.batches, strict=True):
        assert len(one["input_ids"]) == 4
        assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("task", ["causal-lm", "sequence-classification"])
def test_a_folder_is_calibrated_as_the_model_in_memory_is(trained, task, tmp_path):
    path, adapter = trained(task)
    spec = load_run(path, ())
    limit = int(0.6 * inspect_adapter(adapter).parameters)
    from_folder = compress_folder(
        adapter, tmp_path / "small", limit, base=read_by_run(spec, adapter)
    )
    live = load_calibration(spec, adapter)
    in_memory = rf.compress(live.model, limit, loss=live.loss, batches=live.batches)
    assert from_folder.worth == "loss"
    assert from_folder.ranks == in_memory.ranks
    by_energy = rf.compress(load_calibration(spec, adapter).model, limit)
    assert by_energy.ranks != in_memory.ranks


def test_the_command_line_calibrates_by_a_run_spec(trained, tmp_path):
    path, adapter = trained("sequence-classification", "mean")
    small = tmp_path / "small"
    result = compress(adapter, "--rank", 2, "--run", path, "--output", small)
    assert result.exit_code == 0, result.output
    assert "chosen by the loss" in result.output
    calibrated = load_calibration(load_run(path, ()), small)
    assert inspect_adapter(small).trained_parameters < inspect_adapter(adapter).parameters
    assert torch.isfinite(calibrated.loss(calibrated.batches[0]))


def test_a_share_of_the_base_model_is_counted_on_the_runs_model(trained, tmp_path):
    path, adapter = trained()
    budget = tmp_path / "share.toml"
    budget.write_text("fraction = 0.1\n")
    result = compress(adapter, "--budget", budget, "--run", path, "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    base = sum(
        p.numel() for p in load_calibration(load_run(path, ()), adapter).model.unload().parameters()
    )
    spent = inspect_adapter(tmp_path / "small").trained_parameters
    assert 0.08 * base < spent <= 0.1 * base


def test_what_does_not_go_together_is_refused_and_nothing_is_written(trained, tmp_path):
    path, adapter = trained()
    small = tmp_path / "small"
    with_base = compress(adapter, "--rank", 2, "--run", path, "--base", "minilm", "--output", small)
    assert (with_base.exit_code, small.exists()) == (2, False)
    assert "--run names the base model already" in with_base.stderr
    folding = tmp_path / "never.toml"
    folding.write_text('rank = 2\nmagnitude = "never"\n')
    refused = compress(adapter, "--budget", folding, "--run", path, "--output", small)
    assert (refused.exit_code, small.exists()) == (2, False)
    assert "set magnitude = 'always', or choose by energy" in refused.stderr


def test_an_adapter_of_another_model_is_refused(trained, bert_folder):
    path, adapter = trained("causal-lm")
    spec = load_run(path, (f"model.name={bert_folder}", "model.task=sequence-classification"))
    with pytest.raises(RankFlowError, match="does not fit the model"):
        load_calibration(spec, adapter)
