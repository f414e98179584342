import shutil

import huggingface_hub
import pytest
from typer.testing import CliRunner

import rankflow as rf
from rankflow.cli import app
from rankflow.export.inspect import inspect_adapter

HUB_ID = "some-org/some-adapter"


def compress(*arguments):
    return CliRunner().invoke(app, ["compress", *map(str, arguments)])


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """The hub is out of reach, and its cache is an empty folder."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_a_hub_id_without_a_connection_is_refused_with_what_to_do(offline, tmp_path):
    result = compress(HUB_ID, "--rank", 1, "--output", tmp_path / "small")
    assert result.exit_code == 2
    assert f"{HUB_ID} is no folder here, and cannot be fetched from the hub: " in result.stderr
    assert "fetch the adapter while there is a connection" in result.stderr
    assert not (tmp_path / "small").exists()


def test_a_hub_id_that_was_fetched_before_needs_no_connection(offline, make_adapted, tmp_path):
    adapter = rf.export_adapter(make_adapted(), tmp_path / "adapter")
    cached = offline / "models--some-org--some-adapter"
    shutil.copytree(adapter, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    result = compress(HUB_ID, "--rank", 1, "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    assert max(inspect_adapter(tmp_path / "small").ranks.values()) > 0


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_share_of_the_base_model_is_counted_from_its_configuration(
    name, use_dora, make_adapted, tmp_path
):
    model = make_adapted(name, use_dora=use_dora, ranks=(4,))
    adapter = rf.export_adapter(model, tmp_path / "adapter")
    share = tmp_path / "share.toml"
    share.write_text("fraction = 0.25\n")
    result = compress(adapter, "--budget", share, "--output", tmp_path / "small")
    assert result.exit_code == 0, result.output
    in_memory = rf.compress(model, rf.load_budget(share))
    summary = inspect_adapter(tmp_path / "small")
    assert summary.trained_parameters == in_memory.parameters < in_memory.parameters_before
    live = {site: rank for site, rank in in_memory.ranks.items() if rank > 0 or use_dora}
    assert summary.ranks == {site: max(rank, 1) for site, rank in live.items()}


def test_a_share_of_an_unknown_base_model_is_refused(make_adapted, tmp_path):
    model = make_adapted()
    adapter = rf.export_adapter(model, tmp_path / "adapter")
    shutil.rmtree(model.get_base_model().config.name_or_path)
    share = tmp_path / "share.toml"
    share.write_text("fraction = 0.1\n")
    result = compress(adapter, "--budget", share, "--output", tmp_path / "small")
    assert result.exit_code == 2
    assert "name another one with --base" in result.stderr
    assert not (tmp_path / "small").exists()
