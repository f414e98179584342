import json
import shutil
import warnings

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

import rankflow as rf
from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import find_sites
from rankflow.errors import BudgetError, ExportError, FileError, RankFlowError
from rankflow.export.compress_folder import BaseReader, compress_folder
from rankflow.export.inspect import inspect_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def tokens():
    return torch.randint(12, (2, 4), generator=torch.Generator().manual_seed(3))


def no_base(sites):
    assert not sites, "plain LoRA needs no base weight"
    return {}


def rows_of(model):
    rows = {site.name: base_rows(site.layer) for site in find_sites(model)}
    return lambda sites: {site: rows[site] for site in sites}


@pytest.fixture
def saved(mixed, tmp_path):
    """Make an adapter, and the folder in which stock PEFT saved it."""

    def make(**config):
        model = mixed(**{"r": 4, "lora_alpha": 6, **config}).eval()
        model.save_pretrained(tmp_path / "adapter")
        return model, tmp_path / "adapter"

    return make


def load(model, folder):
    """Load a folder on the base weights of a model that had an adapter."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return PeftModel.from_pretrained(model.unload(), folder).eval()


def test_the_tokenizer_goes_along(saved, tmp_path, word_tokenizer):
    _, folder = saved()
    word_tokenizer.save_pretrained(folder)
    compress_folder(folder, tmp_path / "small", 200, base=BaseReader(no_base))
    loaded = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert loaded.chat_template == word_tokenizer.chat_template


def edit_config(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"use_dora": True},
        {"use_rslora": True},
        {"rank_pattern": {"first": 2}, "alpha_pattern": {"conv": 9}},
    ],
    ids=["LoRA", "DoRA", "rsLoRA", "patterns"],
)
def test_a_folder_becomes_what_the_model_in_memory_becomes(config, saved, tmp_path):
    model, folder = saved(**config)
    limit = int(0.6 * sum(site.parameters for site in find_sites(model)))
    rows = rows_of(model) if "use_dora" in config else no_base
    from_folder = compress_folder(folder, tmp_path / "small", limit, base=BaseReader(rows))
    in_memory = rf.compress(model, limit)
    assert from_folder.ranks == in_memory.ranks
    assert from_folder.parameters == in_memory.parameters
    assert from_folder.error == pytest.approx(in_memory.error)
    expected = model(tokens()).detach()
    loaded = load(model, tmp_path / "small")
    torch.testing.assert_close(loaded(tokens()), expected, rtol=1e-5, atol=1e-6)
    summary = inspect_adapter(tmp_path / "small")
    assert summary.trained_parameters == in_memory.parameters


def test_sites_with_nothing_left_are_absent_or_keep_their_magnitude(saved, tmp_path, use_dora):
    model, folder = saved(use_dora=use_dora)
    held = sum(s.magnitude.numel() for s in find_sites(model) if s.magnitude is not None)
    rows = rows_of(model) if use_dora else no_base
    result = compress_folder(folder, tmp_path / "small", held + 20, base=BaseReader(rows))
    dead = {site for site, rank in result.ranks.items() if rank == 0}
    assert dead
    present = {site.name for site in inspect_adapter(tmp_path / "small").sites}
    assert dead & present == (dead if use_dora else set())
    rf.compress(model, held + 20)
    expected = model(tokens()).detach()
    loaded = load(model, tmp_path / "small")
    torch.testing.assert_close(loaded(tokens()), expected, rtol=1e-5, atol=1e-6)


def test_a_dora_folder_can_lose_its_magnitudes(saved, tmp_path):
    model, folder = saved(use_dora=True)
    budget = rf.load_budget("reallocate", rank=2, magnitude="never")
    compress_folder(folder, tmp_path / "small", budget, base=BaseReader(rows_of(model)))
    assert not any("magnitude" in key for key in load_file(tmp_path / "small" / WEIGHTS))
    rf.compress(model, budget)
    expected = model(tokens()).detach()
    loaded = load(model, tmp_path / "small")
    torch.testing.assert_close(loaded(tokens()), expected, rtol=1e-4, atol=1e-5)


def test_what_is_saved_beside_the_sites_comes_along(saved, tmp_path):
    _, folder = saved()
    tensors = load_file(folder / WEIGHTS)
    head = {"base_model.model.head.weight": torch.randn(2, 3)}
    save_file(tensors | head, folder / WEIGHTS, metadata={"format": "pt"})
    edit_config(folder, modules_to_save=["head"])
    compress_folder(folder, tmp_path / "small", error=0.3, base=BaseReader(no_base))
    written = load_file(tmp_path / "small" / WEIGHTS)
    assert torch.equal(written["base_model.model.head.weight"], *head.values())
    assert json.loads((tmp_path / "small" / CONFIG).read_text())["modules_to_save"] == ["head"]


def test_names_that_end_alike_do_not_catch_each_other(adapt, tmp_path):
    inner = torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})
    base = torch.nn.ModuleDict({"block": inner, "q": torch.nn.Linear(4, 4)})
    adapt(base, target_modules=["q"], r=2).save_pretrained(tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    for key in tensors:
        if "block" in key:
            tensors[key] = torch.zeros_like(tensors[key])
    save_file(tensors, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    result = compress_folder(
        tmp_path / "adapter", tmp_path / "s", error=0, base=BaseReader(no_base)
    )
    assert result.ranks == {"block.q": 0, "q": 2}
    fresh = torch.nn.ModuleDict({"block": torch.nn.ModuleDict({"q": torch.nn.Linear(4, 4)})})
    fresh["q"] = torch.nn.Linear(4, 4)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "s")
    assert {site.name: site.rank for site in find_sites(loaded)} == {"q": 2}


def broken(folder, kind):
    match kind:
        case "another kind":
            edit_config(folder, peft_type="IA3")
        case "no folder":
            shutil.rmtree(folder)
        case "no weights":
            (folder / WEIGHTS).unlink()
        case "moved base":
            edit_config(folder, init_lora_weights="pissa")
        case "trained biases":
            edit_config(folder, bias="lora_only")
        case "other ranks":
            edit_config(folder, r=3)
        case "a bias":
            tensors = load_file(folder / WEIGHTS)
            tensors["base_model.model.first.lora_B.bias"] = torch.zeros(5)
            save_file(tensors, folder / WEIGHTS)
        case "not finite":
            tensors = load_file(folder / WEIGHTS)
            tensors["base_model.model.first.lora_B.weight"][0, 0] = torch.nan
            save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("kind", "error", "match"),
    [
        ("another kind", RankFlowError, "has peft_type 'IA3'"),
        ("no folder", RankFlowError, "holds no adapter_config.json"),
        ("no weights", RankFlowError, "cannot be read"),
        ("moved base", ExportError, "init_lora_weights='pissa'"),
        ("trained biases", ExportError, "bias='lora_only'"),
        ("other ranks", ExportError, "PEFT could not load it either"),
        ("a bias", ExportError, "no more than a magnitude beside"),
        ("not finite", FileError, "not finite in 'base_model.model.first.lora_B.weight'"),
    ],
)
def test_an_unfit_folder_is_refused_and_nothing_is_written(kind, error, match, saved, tmp_path):
    _, folder = saved()
    broken(folder, kind)
    with pytest.raises(error, match=match):
        compress_folder(folder, tmp_path / "small", error=0.1, base=BaseReader(no_base))
    assert not (tmp_path / "small").exists()


def test_requests_that_do_not_fit_are_refused_and_nothing_is_written(saved, tmp_path):
    model, folder = saved(use_dora=True)
    rows, small = rows_of(model), tmp_path / "small"
    with pytest.raises(BudgetError, match="is more than the"):
        compress_folder(folder, small, 10_000, base=BaseReader(rows))
    with pytest.raises(BudgetError, match="is less than the"):
        compress_folder(folder, small, 5, base=BaseReader(rows))
    fraction = rf.load_budget("reallocate", fraction=0.01)
    with pytest.raises(BudgetError, match="nothing tells them"):
        compress_folder(folder, small, fraction, base=BaseReader(rows))
    with pytest.raises(ExportError, match="is the adapter itself"):
        compress_folder(folder, folder, 100, base=BaseReader(rows))
    with pytest.raises(ExportError, match=r"of shape \(5, 5\) in the adapter"):
        compress_folder(
            folder,
            small,
            100,
            base=BaseReader(lambda sites: rows(sites) | {"first": torch.zeros(2, 2)}),
        )
    assert not small.exists()


def test_a_share_of_the_base_models_parameters_is_a_budget_where_they_can_be_counted(
    saved, tmp_path
):
    model, folder = saved()
    base = sum(p.numel() for name, p in model.named_parameters() if ".lora_" not in name)
    budget = rf.load_budget("reallocate", fraction=0.5)
    reader = BaseReader(no_base, parameters=lambda: base)
    result = compress_folder(folder, tmp_path / "small", budget, base=reader)
    in_memory = rf.compress(model, budget)
    assert result.parameters == in_memory.parameters <= 0.5 * base
    assert result.ranks == in_memory.ranks


def test_bfloat16_stays_bfloat16(saved, tmp_path):
    _, folder = saved()
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    result = compress_folder(folder, tmp_path / "small", error=0.2, base=BaseReader(no_base))
    written = load_file(tmp_path / "small" / WEIGHTS)
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert sum(tensor.numel() for tensor in written.values()) == result.parameters
    assert np.isclose(result.error, 0.2, atol=0.1)
