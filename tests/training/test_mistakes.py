"""What a person gets wrong about a run: the message names it and the remedy, no traceback.

Every kind of mistake is in ``tests/reliability/inputs``; here is how a command ends on one.
"""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rankflow.cli import app

RUN = """
name = "trial"
[model]
name = "bert"
task = "sequence-classification"
pooling = "mean"
[data]
train = "rows.jsonl"
max_length = 16
[budget]
rank = 2
schedule = "constant"
[train]
max_steps = 4
use_cpu = true
save_strategy = "no"
report_to = "none"
"""


@pytest.fixture
def desk(tmp_path, monkeypatch, bert_folder, llama_folder, write_rows, sentiment_rows):
    """A folder with a run spec that works, and with much that does not."""
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", sentiment_rows)
    Path("run.toml").write_text(RUN)
    Path("broken.toml").write_text("[model\n")
    Path("empty.toml").write_text("")
    Path("latin.toml").write_bytes(b"name = '\xe9")
    Path("foreign").mkdir()
    Path("foreign/thesis.tex").write_text("years of work")
    Path("file").write_text("")
    return tmp_path


@pytest.fixture
def spoil(desk):
    """Make a copy of the model and damage it; return its name."""

    def make(pattern, content=None):
        copy = desk / "spoiled"
        copy.mkdir()
        for file in (desk / "bert").iterdir():
            (copy / file.name).write_bytes(file.read_bytes())
        for file in copy.glob(pattern):
            file.unlink() if content is None else file.write_bytes(content)
        return copy.name

    return make


def run(*arguments):
    return CliRunner().invoke(app, arguments)


def check_told(result, *told):
    """A message that holds all this, an exit code for scripts, and no traceback."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 2
    for words in told:
        assert words in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("none.toml", "none.toml cannot be read: No such file or directory; name a TOML file"),
        ("foreign", "foreign cannot be read: Is a directory; name a TOML file"),
        (
            "broken.toml",
            "not valid TOML: Expected ']' at the end of a table declaration (at line 1",
        ),
        ("latin.toml", "is not UTF-8: unexpected end of data at byte 8; save it as UTF-8"),
        ("empty.toml", "missing; add [model] with name and task"),
    ],
)
def test_a_file_that_is_no_run_spec(file, told, desk):
    check_told(run("train", file), told)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("budget.rank=100", "hold at most 7,168 (their maximum ranks); choose a budget in between"),
        ("model.name=org/nowhere", "a hub id (which needs a connection or a filled cache)"),
        ("model.name=file", "give 'minilm', a folder that `save_pretrained` wrote"),
        ("model.attention=flash_attention_2", "leave the key out"),
        ("train.tf32=true", "--tf32 requires Ampere"),
        ("train.lr_scheduler_type=cosine_with_min_lr", "min_lr_rate should be set"),
        ("train.optim=galore_adamw", "change or remove the key that asks for it"),
    ],
)
def test_a_key_that_cannot_be(override, told, desk):
    check_told(run("plan", "run.toml", "--set", override), told)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"task": "causal-lm"}, "would see the words that it has to predict; choose a model"),
        ({"task": "seq2seq-lm"}, "give a whole model that transformers knows for this task"),
        ({"task": "token-classification"}, "[data] text needs a list of words in each row"),
    ],
)
def test_a_task_that_model_or_rows_do_not_fit(overrides, told, desk):
    target = ["--set", "data.target=label"] if overrides["task"] == "seq2seq-lm" else []
    overrides = overrides | {"pooling": "model"}
    settings = [text for k, v in overrides.items() for text in ("--set", f"model.{k}={v}")]
    check_told(run("plan", "run.toml", *settings, *target), told)


@pytest.mark.parametrize(
    ("pattern", "content", "told"),
    [
        ("config.json", None, "give 'minilm', a folder that `save_pretrained` wrote"),
        ("config.json", b"{nope", "is not valid JSON"),
        ("config.json", b'{"model_type": "zorg"}', "does not recognize this architecture"),
        ("model.safetensors", None, "no file named model.safetensors"),
        (
            "model.safetensors",
            b"\x08\x00\x00\x00",
            "is damaged: it has 4 bytes; save or copy it again",
        ),
        ("tokenizer*", None, "no word, only special tokens; put the model's tokenizer files"),
        ("tokenizer.json", b"{nope", "put the model's tokenizer files into its folder"),
    ],
)
def test_a_model_that_is_not_whole(pattern, content, told, spoil):
    name = spoil(pattern, content)
    check_told(run("train", "run.toml", "--set", f"model.name={name}"), f"'{name}'", told)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("train.output_dir=foreign", "no run wrote it (it has no run.json); choose another folder"),
        ("train.report_to=wandbb", "wandbb is not supported"),
        ("train.resume_from_checkpoint=nowhere", "no such folder; name another checkpoint"),
    ],
)
def test_what_is_wrong_leaves_an_earlier_run_where_it_is(override, told, desk):
    folder = desk / "runs/trial"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({}))
    result = run(
        "train", "run.toml", "--set", "data.validation_fraction=0", "--set", override, "--json"
    )
    check_told(result, told)
    assert result.stdout == ""
    assert [path.name for path in folder.parent.iterdir()] == ["trial"]
