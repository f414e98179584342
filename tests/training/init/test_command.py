import io
import math
import os
import re
from pathlib import Path
from typing import get_args

import pytest
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)
from typer.testing import CliRunner

from rankflow.cli import app
from rankflow.specs.run import Task, load_run
from rankflow.training.run import train

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What was good?"},
    {"role": "assistant", "content": "The film."},
]
FEW_STEPS = (
    *("train.max_steps=4", "train.warmup_steps=1", "train.save_strategy=no", "train.use_cpu=true"),
    *(
        "train.per_device_train_batch_size=4",
        "budget.every=1",
        "train.gradient_accumulation_steps=1",
    ),
)


def run(*arguments):
    return CliRunner().invoke(app, ["init", *map(str, arguments)])


def rows_of(sentiment_rows):
    """Rows for each task, by the folder of the model that learns them."""
    words = [row["text"].split() for row in sentiment_rows]
    tags = [["O"] * (len(row) - 1) + ["B"] for row in words]
    return {
        "texts": ("bert", sentiment_rows),
        "words": ("bert", [{"tokens": w, "tags": t} for w, t in zip(words, tags, strict=True)]),
        "plain": ("llama", [{"body": row["text"]} for row in sentiment_rows]),
        "answers": (
            "llama",
            [{"prompt": row["text"][:12], "completion": row["text"]} for row in sentiment_rows],
        ),
        "conversations": ("chat", [{"id": str(n), "messages": CHAT} for n in range(20)]),
        "prompts and answers": ("chat", [{"prompt": CHAT[:2], "completion": CHAT[2:]}] * 20),
        "summaries": (
            "bart",
            [{"document": row["text"] + f" {n}", "summary": row["text"] + f" good {n}"}
             for n, row in enumerate(sentiment_rows)],
        ),
    }  # fmt: skip


TASKS = {
    "texts": ("sequence-classification", AutoModelForTokenClassification),
    "words": ("token-classification", AutoModelForTokenClassification),
    "plain": ("causal-lm", AutoModelForCausalLM),
    "answers": ("causal-lm", AutoModelForCausalLM),
    "conversations": ("causal-lm", AutoModelForCausalLM),
    "prompts and answers": ("causal-lm", AutoModelForCausalLM),
    "summaries": ("seq2seq-lm", AutoModelForSeq2SeqLM),
}


@pytest.mark.parametrize("case", TASKS)
def test_what_is_written_loads_trains_and_exports(
    case, request, write_rows, sentiment_rows, tmp_path
):
    task, host = TASKS[case]
    kind, rows = rows_of(sentiment_rows)[case]
    folder = request.getfixturevalue(f"{kind}_folder")
    output = tmp_path / "specs" / "mine.toml"
    data = write_rows("rows.jsonl", rows)
    result = run("--model", folder, "--data", data, "--rank", 2, "--output", output)
    assert result.exit_code == 0, result.output
    assert f"  {task} on {folder}, a" in result.output
    assert f"next\n  rankflow plan {output}\n  rankflow train {output}\n" in result.output
    spec = load_run(output, [*FEW_STEPS, f"train.output_dir={tmp_path / 'out'}"])
    assert (spec.name, spec.model.task, spec.budget.rank) == ("mine", task, 2)
    trained = train(spec, console=Console(file=io.StringIO()))
    assert trained.spent <= trained.target
    assert all(math.isfinite(value) for value in trained.metrics.values())
    classes = {"num_labels": trained.classes} if trained.classes else {}
    PeftModel.from_pretrained(host.from_pretrained(folder, **classes), trained.adapter)


def uncommented(text):
    """Each line that shows a key which could be set, set."""
    for line in text.splitlines():
        match = re.match(r"# (\w+ = .*)", line)
        if match:
            yield text.replace(line, match[1].replace("FILE", "other.jsonl")), match[1]


@pytest.mark.parametrize("case", ["texts", "conversations", "plain"])
def test_every_key_that_could_be_set_can_be(case, request, write_rows, sentiment_rows, tmp_path):
    kind, rows = rows_of(sentiment_rows)[case]
    folder = request.getfixturevalue(f"{kind}_folder")
    output = tmp_path / "run.toml"
    data = write_rows("rows.jsonl", rows)
    assert run("--model", folder, "--data", data, "--output", output).exit_code == 0
    write_rows("other.jsonl", rows)
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    shown = list(uncommented(output.read_text()))
    assert len(shown) > 5
    for text, line in shown:
        if line.startswith("validation ="):
            output.write_text(re.sub("validation_fraction = .*", "", text))
        else:
            output.write_text(text)
        load_run(output)


def test_every_task_can_be_asked_for():
    choices = " ".join(run("--task", "none", "--model", "m", "--data", "d").stderr.split())
    assert all(f"'{task}'" in choices for task in get_args(Task))


def test_paths_are_written_as_the_spec_sees_them(
    bert_folder, write_rows, sentiment_rows, tmp_path, monkeypatch
):
    write_rows("rows.jsonl", sentiment_rows)
    (tmp_path / "mine.toml").write_text('description = "my own"\nscore = "taylor"\n')
    monkeypatch.chdir(tmp_path)
    result = run(
        *("--model", os.path.relpath(bert_folder), "--data", "rows.jsonl", "--rank", 1.5),
        *("--budget", "./mine.toml", "--output", "deep/er/run.toml"),
    )
    assert result.exit_code == 0, result.output
    monkeypatch.chdir("/")
    spec = load_run(tmp_path / "deep" / "er" / "run.toml")
    assert Path(spec.model.name).resolve() == Path(bert_folder)
    assert spec.data.train[0].resolve() == tmp_path / "rows.jsonl"
    assert (spec.budget.score, spec.budget.rank) == ("taylor", 1.5)
    text = (tmp_path / "deep" / "er" / "run.toml").read_text()
    assert '[budget]\npreset = "../../mine.toml"  # my own\n' in text
    assert "use_dora = false" in text


def test_the_reasons_are_those_of_the_data_and_the_model(
    bert_folder, write_rows, sentiment_rows, tmp_path
):
    rows = [row | {"source": f"site {n}"} for n, row in enumerate(sentiment_rows)]
    output = tmp_path / "run.toml"
    result = run("--model", bert_folder, "--data", write_rows("rows.jsonl", rows),
                 "--text", "text", "--output", output)  # fmt: skip
    assert result.exit_code == 0, result.output
    text = output.read_text()
    assert "# an encoder of" in text
    assert 'label = "label"  # 2 classes in the first rows' in text
    assert "# Not read: source" in text
    assert "max_length = 16  # tokens: 100.0% of the first 20 rows fit, of up to 9;" in text
    assert "float32" in text
    assert load_run(output).adapter["use_dora"]


def test_a_decoder_that_classifies_keeps_its_own_head(
    llama_folder, write_rows, sentiment_rows, tmp_path
):
    output, data = tmp_path / "run.toml", write_rows("rows.jsonl", sentiment_rows)
    call = ("--model", llama_folder, "--data", data, "--output", output, "--rank", 2)
    assert "add --task causal-lm or --task sequence-classification" in " ".join(
        run(*call).stderr.split()
    )
    assert not output.exists()
    assert run(*call, "--task", "sequence-classification").exit_code == 0
    spec = load_run(output, [*FEW_STEPS, f"train.output_dir={tmp_path / 'out'}"])
    assert spec.model.pooling == "model"
    trained = train(spec, console=Console(file=io.StringIO()))
    base = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=2)
    PeftModel.from_pretrained(base, trained.adapter)


def test_a_chat_template_of_ones_own_is_named_in_the_spec(llama_folder, write_rows, tmp_path):
    template = tmp_path / "chat.jinja"
    template.write_text(
        "{% for m in messages %}{{ m.role + ' ' + m.content + ' [SEP]' }}{% endfor %}"
    )
    data = write_rows("rows.jsonl", [{"messages": CHAT}] * 4)
    output = tmp_path / "run.toml"
    call = ("--model", llama_folder, "--data", data, "--output", output)
    assert "no chat template; name a file" in " ".join(run(*call).stderr.split())
    result = run(*call, "--chat-template", template)
    assert result.exit_code == 0, result.output
    assert load_run(output).model.chat_template == template


def test_a_validation_split_takes_the_place_of_a_held_out_fraction(
    monkeypatch, bert_folder, tmp_path
):
    from datasets import Dataset

    rows = Dataset.from_list([{"text": f"text {n}", "label": n % 2} for n in range(9)])
    monkeypatch.setattr(
        "rankflow.training.sources.load_dataset",
        lambda name, config, streaming: {"train": rows, "validation": rows},
    )
    output = tmp_path / "run.toml"
    call = ("--model", bert_folder, "--data", "owner/rows", "--config", "en", "--output", output)
    assert run(*call).exit_code == 0
    text = output.read_text()
    assert "validation_fraction" not in text
    spec = load_run(output)
    assert (spec.data.name, spec.data.config) == ("owner/rows", "en")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--output", "there.toml"), "there.toml exists and is not overwritten; name another file"),
        (("--output", "run.yaml"), "--output run.yaml: a run spec ends in .toml"),
        (("--budget", "hybird"), "did you mean 'hybrid'?"),
        (("--rank", "-1"), "rank = -1"),
        (("--data", "none.jsonl"), "--data none.jsonl: no such file"),
        (("--model", "./nowhere"), "--model ./nowhere: "),
        (("--chat-template", "there.toml"), "only conversations are written by one"),
        (("--label", "lable"), "--label lable: the data has no such column; did you mean 'label'?"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_is(
    options, message, bert_folder, write_rows, sentiment_rows, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("there.toml").write_text("mine")
    data = write_rows("rows.jsonl", sentiment_rows)
    result = run("--model", bert_folder, "--data", data, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert Path("there.toml").read_text() == "mine"
    assert not Path("run.toml").exists()
