import json
import math
from io import StringIO

import peft
import pytest
import torch
from rich.console import Console
from scipy import stats
from transformers import Trainer, TrainingArguments
from typer.testing import CliRunner

from rankflow.analysis.run import analyze
from rankflow.cli import app
from rankflow.errors import RankFlowError
from rankflow.export.peft import export_adapter
from rankflow.integrations.huggingface import RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MOVES = {"warmup": 1, "cooldown": 0, "every": 1, "hysteresis": 0, "protect": 0, "seed": 0}
HYBRID = BudgetSpec(
    **MOVES,
    params=500,
    start=2,
    schedule="linear",
    magnitude="budgeted",
    score="random",
    policy="threshold",
    recycle=0,
)


def make_data(rows=24):
    tokens = torch.randint(1, 13, (rows, 6), generator=torch.Generator().manual_seed(2))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3}
        for row in tokens
    ]


def make_arguments(folder):
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.02,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
    )


@pytest.fixture
def trained(classify, tmp_path):
    """Train a classifier around the base by a method, with a checkpoint at three moments."""

    def train(name):
        folder, classifier = tmp_path / "runs" / name, classify()
        arguments = {"args": make_arguments(folder), "train_dataset": make_data()}
        if name == "full":
            Trainer(model=classifier, **arguments).train()
            return folder
        config = peft.LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=["query", "value", "dense"],
            task_type="SEQ_CLS",
            use_dora=name != "lora",
        )
        model = peft.get_peft_model(classifier, config)
        if name == "hybrid":
            RankFlowTrainer(model=model, budget=HYBRID, **arguments).train()
        else:
            Trainer(model=model, **arguments).train()
        export_adapter(model, folder / "adapter")
        return folder

    return train


def run_command(*arguments):
    return CliRunner().invoke(app, ["analyze", *map(str, arguments)])


def read_results(folder):
    """Read the JSON as a strict reader would, to whom nan is no number."""

    def refuse(constant):
        raise ValueError(constant)

    text = (folder / "analysis.json").read_text(encoding="utf-8")
    return json.loads(text, parse_constant=refuse)


def silent():
    return Console(file=StringIO())


def test_runs_of_every_kind_are_measured_and_compared(trained, base_folder, tmp_path):
    runs = [trained(name) for name in ("full", "lora", "dora", "hybrid")]
    output = tmp_path / "out"
    result = run_command(*runs, "--base", base_folder, "--output", output)
    assert result.exit_code == 0, result.output
    for name in ("full", "lora", "dora", "hybrid"):
        assert f"{name}: " in result.stdout
    tables = result.stdout.partition("Written to")[0]
    assert max(map(len, tables.splitlines())) <= 80
    assert (output / "analysis.png").read_bytes().startswith(PNG_SIGNATURE)

    full, lora, dora, hybrid = read_results(output)["runs"]
    moments = ["step 2", "step 4", "step 6"]
    for run in (full, lora, dora):
        assert list(run["by_checkpoint"]) == moments  # the adapter at the end is the last of them
    assert list(hybrid["by_checkpoint"])[:3] == moments
    kinds = ["query", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
    assert [kind for kind in lora["by_kind"] if kind != "pooler.dense"] == kinds
    assert "key" in full["by_kind"]
    assert len(lora["points"]) == 3 * (4 * 5 + 1)
    for run in (full, lora, dora, hybrid):
        check_correlations(run)


def check_correlations(run):
    """Recompute the pooled correlation from the points in the file."""
    moved = [p for p in run["points"] if p["moved"]]
    changes = [p["dD"] for p in moved], [p["dM"] for p in moved]
    found = run["correlation"]
    assert found["points"] == len(moved)
    assert found["pearson"]["value"] == pytest.approx(stats.pearsonr(*changes).statistic)
    assert found["spearman"]["value"] == pytest.approx(stats.spearmanr(*changes).statistic)
    assert found["pearson"]["low"] <= found["pearson"]["high"]


def test_a_site_that_dies_is_still_and_one_with_a_magnitude_alone_grows(trained, base_folder):
    (analysis,) = analyze([trained("hybrid")], base=str(base_folder), console=silent())
    changes = [point.change for point in analysis.run.points]
    assert any(change.is_nothing for change in changes)
    assert any(change.dD == 0 and change.dM > 1e-4 for change in changes)
    assert analysis.pooled.points == sum(not change.is_nothing for change in changes)


@pytest.fixture
def planted(bert, change_rows, tmp_path):
    """Write full fine-tunes whose layers turn the more, the less (or more) they grow."""

    def plant(sign):
        folder = tmp_path / f"planted{sign}"
        for step in (1, 2):
            changes = {
                f"encoder.layer.{layer}.attention.self.{kind}": (
                    0.1 * step * (layer + 1),
                    1 + 0.05 * step + sign * 0.02 * layer,
                )
                for layer in range(4)
                for kind in ("query", "value")
            }
            change_rows(bert, changes).save_pretrained(folder / f"checkpoint-{step}")
        return folder

    return plant


def test_planted_relations_are_recovered(planted, base_folder):
    rising, falling = analyze([planted(1), planted(-0.5)], base=str(base_folder), console=silent())
    for found in (*rising.kinds.values(), *rising.moments.values()):
        assert found.pearson.value > 0.8
        assert found.spearman.value > 0.8
    for found in falling.moments.values():
        assert found.pearson.value < -0.9
        assert found.pearson.high < -0.5
        assert found.spearman.value < -0.9
        assert found.spearman.high < 0
    query = [p for p in rising.run.points if "query" in p.site and p.moment == 1]
    for layer, point in enumerate(query):
        assert point.change.dD == pytest.approx(1 - math.cos(0.2 * (layer + 1)), rel=1e-4)
        growth = 0.1 + 0.02 * layer
        assert point.change.dM == pytest.approx(growth * point.change.norm, rel=1e-4)


def test_only_what_matches_is_analysed(planted, base_folder, tmp_path):
    output = tmp_path / "out"
    result = run_command(planted(1), "--base", base_folder, "--match", "query", "--output", output)
    assert result.exit_code == 0
    results = read_results(output)
    assert results["match"] == "query"
    assert {point["kind"] for point in results["runs"][0]["points"]} == {"query"}
    assert "value" not in result.stdout


def test_one_moved_weight_has_no_correlation_and_the_reason_is_told(
    bert, change_rows, base_folder, tmp_path
):
    site = "encoder.layer.2.attention.self.key"
    change_rows(bert, {site: (0.2, 1.5)}).save_pretrained(tmp_path / "tuned")
    output = tmp_path / "out"
    result = run_command(tmp_path / "tuned", "--base", base_folder, "--output", output)
    assert result.exit_code == 0
    assert "fewer than 3 points" in result.stdout
    (run,) = read_results(output)["runs"]
    assert run["correlation"]["pearson"] is None
    (point,) = run["points"]
    assert (point["site"], point["layer"], point["step"]) == (site, "2", None)


def test_pure_scaling_has_a_constant_direction(bert, change_rows, base_folder, tmp_path):
    changes = {f"encoder.layer.{i}.attention.self.key": (0.0, 1.1 + i) for i in range(4)}
    change_rows(bert, changes).save_pretrained(tmp_path / "tuned")
    (analysis,) = analyze([tmp_path / "tuned"], base=str(base_folder), console=silent())
    assert analysis.pooled.points == 4
    assert {point.change.dD for point in analysis.run.points} == {0.0}
    assert analysis.pooled.reason == "dD or dM is constant"


def test_rows_of_zeros_are_counted(bert, change_rows, tmp_path):
    site = "encoder.layer.0.attention.self.query"
    bert.get_submodule(site).weight.data[:2] = 0
    bert.save_pretrained(tmp_path / "base")
    tuned = change_rows(bert, {"encoder.layer.1.attention.self.query": (0.2, 1.5)})
    tuned.get_submodule(site).weight.data += 0.01
    for step in (1, 2):
        tuned.save_pretrained(tmp_path / "tuned" / f"checkpoint-{step}")
    result = run_command(tmp_path / "tuned", "--base", tmp_path / "base")
    assert result.exit_code == 0
    assert "tuned: 2 rows of zeros left out of dD." in result.stdout


def test_the_same_runs_give_the_same_file(planted, base_folder, tmp_path):
    folder = planted(-0.5)
    texts = []
    for output in (tmp_path / "one", tmp_path / "two"):
        analyze([folder], base=str(base_folder), console=silent(), output=output)
        texts.append((output / "analysis.json").read_bytes())
    assert texts[0] == texts[1]


def test_a_run_of_nothing_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(RankFlowError, match="holds no weights"):
        analyze([tmp_path], base="no-such-model", console=silent())


def test_errors_end_as_a_message(planted, base_folder):
    result = run_command(planted(1), "--base", base_folder, "--match", "qery")
    assert (result.exit_code, result.stdout.strip()) == (2, "")
    assert "did you mean 'attention.self.query'" in result.stderr
