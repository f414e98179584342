"""What a person gets wrong beside training: the message names it and the remedy, no traceback."""

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.numpy import save_file
from typer.testing import CliRunner

from rankflow.cli import app

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": None}


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A run with an adapter, and much that is none."""
    monkeypatch.chdir(tmp_path)
    names = ("run/adapter", "cut", "unread", "ia3", "bare", "log", "foreign", "empty")
    for name in names:
        Path(name).mkdir(parents=True)
    weights = {
        "base_model.model.q.lora_A.weight": np.ones((2, 7), np.float32),
        "base_model.model.q.lora_B.weight": np.ones((5, 2), np.float32),
    }
    for name in names[:5]:
        Path(name, "adapter_config.json").write_text(json.dumps(CONFIG))
        save_file(weights, Path(name, "adapter_model.safetensors"))
    Path("cut/adapter_model.safetensors").write_bytes(b"\x40")
    Path("unread/adapter_config.json").write_text("{nope")
    Path("ia3/adapter_config.json").write_text(json.dumps(CONFIG | {"peft_type": "IA3"}))
    Path("bare/adapter_model.safetensors").unlink()
    Path("log/events.jsonl").write_text("{nope\n")
    Path("foreign/thesis.tex").write_text("years of work")
    Path("file").write_text("")
    Path("broken.toml").write_text("[budget\n")


def run(line):
    return CliRunner().invoke(app, line.split())


def check_told(result, told):
    assert isinstance(result.exception, SystemExit), result.exception
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("inspect nowhere", "name the folder of an adapter or a run"),
        ("inspect cut", "cut/adapter_model.safetensors is damaged"),
        ("inspect unread", "is not valid JSON"),
        ("inspect ia3", "has peft_type 'IA3'; only LORA (LoRA, DoRA) can be read; name another"),
        ("inspect bare", "adapter_model.safetensors cannot be read"),
        ("inspect log", "events.jsonl, line 1: not an event of RankFlow"),
        ("inspect run/adapter --png ranks.jpeg", "ranks.jpeg is to be a file; its name must end"),
        ("inspect run/adapter --png no/x.png", "no/x.png: there is no folder no; make it first"),
        ("export empty --output out", "no finished run and no checkpoint; name the folder of one"),
        ("export run --output out --format peeft", "did you mean 'peft'?"),
        ("export run --output out --format comfyui", "use merged, or lora-svd"),
        ("export run --output out --rank 3", "does not heed rank; it belongs to peft-uniform"),
        ("export run --output out --format merged --dtype int4", "must be one of float64, float32"),
        ("export run --output out --format merged --max-shard-size 5", "a size such as 5GB"),
        ("export run --output out --format merged", "does not say what its base model is; name it"),
        ("export run --output foreign", "holds no adapter, so it is not replaced; choose another"),
        ("export run --output file", "file is a file, and an adapter is a folder; choose another"),
        ("export run --output file/out", "a file lies where a folder is meant; name another path"),
        ("compress nowhere --output out --rank 1", "fetch the adapter while there is a connection"),
        ("compress run --output out --rank 1", "no adapter_config.json; did you mean run/adapter?"),
        ("compress empty --output out --rank 1", "name an adapter's folder"),
        ("compress run/adapter --output out", "say how much may be left: --budget, --rank"),
        ("compress run/adapter --output out --rank -1", "must be greater than 0"),
        ("compress run/adapter --output out --rank 1 --ranks x.tml", "must end in .toml"),
        ("compress run/adapter --output out --budget no.toml", "name a TOML file that exists"),
        ("compress run/adapter --output foreign --params 12", "is not replaced; choose another"),
        ("bench --quick --device nowhere", "'nowhere' cannot be used here"),
        ("bench --dtype int8", "try float32 or bfloat16"),
        ("bench --case llama", "the cases are llama-r32"),
        ("ablate", "name an ablation's TOML file, or use --list"),
        ("ablate broken.toml", "is not valid TOML"),
        ("analyze empty --base file", "name the folder of a run, a checkpoint, an adapter or a"),
        ("budgets show adalra", "did you mean 'adalora'?"),
        ("budgets show broken.toml", "is not valid TOML"),
        ("budgets show empty/", "cannot be read: Is a directory; name a TOML file"),
        ("init --model file --data no.jsonl", "--data no.jsonl: no such file"),
        ("init --model file --data no.jsonl --output file", "exists and is not overwritten"),
    ],
)
def test_a_mistake_is_named_with_its_remedy(line, told, desk):
    check_told(run(line), told)
    assert not Path("out").exists()


def refuse(code):
    def write(*_, **__):
        raise OSError(code, os.strerror(code), "runs/a")

    return write


@pytest.mark.parametrize(
    ("code", "remedy"),
    [
        (errno.ENOSPC, "No space left on device; free some space, or write elsewhere"),
        (errno.EACCES, "Permission denied; choose a place that you may write to"),
        (errno.EROFS, "Read-only file system; choose a place that you may write to"),
        (errno.EIO, "Input/output error; name another path"),
    ],
)
def test_what_the_system_refuses_is_told_with_the_place(code, remedy, desk, monkeypatch):
    monkeypatch.setattr("rankflow.durable.seal", refuse(code))
    check_told(run("export run --output out"), f"error: runs/a: {remedy}")


@pytest.mark.parametrize(
    "error",
    [
        Exception("No space left on device (os error 28)"),  # as tokenizers raise it
        RuntimeError("basic_ios::clear: iostream error"),  # as torch does
    ],
)
def test_a_full_disk_is_told_whatever_library_finds_it(error, desk, monkeypatch):
    def write(*_):
        raise error

    monkeypatch.setattr("rankflow.specs.budget.load_budget", write)
    check_told(run("budgets show adalora"), "free some space, or write elsewhere")


def test_a_lost_connection_is_told_in_the_librarys_words(desk, monkeypatch):
    def fetch(*_):
        raise LocalEntryNotFoundError("the hub cannot be reached")

    monkeypatch.setattr("rankflow.specs.budget.load_budget", fetch)
    check_told(run("budgets show adalora"), "error: the hub cannot be reached")


def test_a_reader_that_leaves_is_no_mistake(desk, monkeypatch):
    monkeypatch.setattr("rankflow.specs.budget.load_budget", refuse(errno.EPIPE))
    result = run("budgets show adalora")
    assert (result.exit_code, result.stderr) == (1, "")


def test_debug_shows_where_the_system_refused(desk, monkeypatch):
    monkeypatch.setattr("rankflow.specs.budget.load_budget", refuse(errno.ENOSPC))
    assert isinstance(run("--debug budgets show adalora").exception, OSError)
