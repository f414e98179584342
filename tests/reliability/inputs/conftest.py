"""A run that would train if it were not for one mistake; and what must hold when it is refused."""

import json
import shutil
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from rankflow.cli import app
from rankflow.errors import RankFlowError

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


@pytest.fixture(scope="session")
def models(desk, tmp_path_factory):
    """Write ``llama``, ``unpadded`` (no token to pad with) and ``foreign`` (another tokenizer)."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(desk / "bert")
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=10, pad_token_id=0, **SHAPE))
    for name in ("llama", "unpadded"):
        llama.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "llama")
    BertModel(BertConfig(vocab_size=7, **SHAPE)).save_pretrained(folder / "foreign")
    tokenizer.save_pretrained(folder / "foreign")
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder / "unpadded")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def bench(desk, models, cache, tmp_path, monkeypatch):
    """A folder with the run, its rows and models, and an earlier run; nothing may train in it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *_: pytest.fail("it trains"))
    monkeypatch.chdir(tmp_path)
    for model in (desk / "bert", *models.iterdir()):
        (tmp_path / model.name).symlink_to(model)
    for name in ("run.toml", "rows.jsonl"):
        shutil.copy(desk / name, name)
    earlier = tmp_path / "runs" / "trial"
    earlier.mkdir(parents=True)
    (earlier / "run.json").write_text(json.dumps({"name": "trial"}))
    return tmp_path


@pytest.fixture
def refuse(bench):
    """Run ``rankflow train``, which must refuse and leave every file alone; return the message."""

    def run(*settings):
        before = contents(bench)
        options = [text for setting in settings for text in ("--set", setting)]
        result = CliRunner().invoke(app, ["--debug", "train", "run.toml", *options])
        assert isinstance(result.exception, RankFlowError), result.exception
        assert contents(bench) == before
        return " ".join(str(result.exception).split())

    return run


def contents(folder: Path) -> dict[Path, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture(autouse=True, scope="session")
def seeded():
    torch.manual_seed(0)
