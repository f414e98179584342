import json

import pytest
import torch
import transformers
from torch import nn

from rankflow.errors import ExportError
from rankflow.export import merged as merged_module
from rankflow.export.options import ExportOptions
from rankflow.export.peft import export_adapter
from rankflow.export.report import read_report

AUTO = {
    "llama": transformers.AutoModelForCausalLM,
    "bert": transformers.AutoModelForSequenceClassification,
}


def write(model, folder, **options):
    return export_adapter(model, folder, format="merged", options=ExportOptions(**options))


@pytest.mark.parametrize("name", AUTO)
def test_transformers_gives_the_live_logits(
    make_adapted, tmp_path, logits_of, stock_base, name, use_dora
):
    model = make_adapted(name, use_dora=use_dora)
    assert (logits_of(stock_base(model)) - logits_of(model)).abs().max() > 0.1
    folder = write(model, tmp_path / "out")
    loaded = AUTO[name].from_pretrained(folder)
    assert type(loaded) is type(model.get_base_model())
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5
    report = read_report(folder)
    assert report.relative_error < 1e-5
    assert report.adapter_effect > 0.1
    assert report.checked_by == f"transformers.{type(loaded).__name__}.from_pretrained"
    assert report.parameters == sum(p.numel() for p in loaded.parameters())


def test_the_trained_head_takes_the_place_of_the_old_one(make_adapted, tmp_path):
    model = make_adapted("bert")
    loaded = AUTO["bert"].from_pretrained(write(model, tmp_path / "out"))
    live = model.get_base_model().classifier
    assert torch.equal(loaded.classifier.weight, live.modules_to_save["default"].weight)
    assert not torch.equal(loaded.classifier.weight, live.original_module.weight)


def test_a_dead_site_keeps_its_weight(make_adapted, tmp_path, stock_base):
    model = make_adapted(ranks=(0, 2))
    loaded = AUTO["llama"].from_pretrained(write(model, tmp_path / "out"))
    name = "model.layers.0.self_attn.q_proj"
    base = stock_base(model).get_submodule(name).weight
    assert torch.equal(loaded.get_submodule(name).weight, base)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_weights_can_be_of_another_type(make_adapted, tmp_path, logits_of, dtype):
    model = make_adapted(use_dora=True)
    folder = write(model, tmp_path / "out", dtype=dtype)
    assert json.loads((folder / "config.json").read_text())["dtype"] == dtype
    loaded = AUTO["llama"].from_pretrained(folder)
    assert {p.dtype for p in loaded.parameters()} == {getattr(torch, dtype)}
    report = read_report(folder)
    error = (logits_of(loaded).double() - logits_of(model).double()).abs().max()
    assert error <= 2 * report.tolerance * logits_of(model).abs().max()
    assert report.absolute_error > 0 if dtype != "float64" else report.relative_error < 1e-5


def test_a_model_in_bfloat16_keeps_its_type(make_adapted, tmp_path):
    model = make_adapted().to(torch.bfloat16)
    loaded = AUTO["llama"].from_pretrained(write(model, tmp_path / "out"))
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}


def test_files_are_no_larger_than_asked_for(make_adapted, tmp_path, logits_of):
    model = make_adapted()
    folder = write(model, tmp_path / "out", max_shard_size="4KB")
    files = list(folder.glob("*.safetensors"))
    assert len(files) > 3
    assert (folder / "model.safetensors.index.json").is_file()
    loaded = AUTO["llama"].from_pretrained(folder)
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5
    assert read_report(folder).bytes == sum(file.stat().st_size for file in files)


def test_a_tokenizer_is_included_with_its_chat_template(make_adapted, tmp_path, word_tokenizer):
    folder = write(make_adapted(), tmp_path / "out", tokenizer=word_tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert loaded("w7")["input_ids"] == [7]
    assert loaded.chat_template == word_tokenizer.chat_template
    assert read_report(folder).tokenizer


def test_the_tokenizer_beside_the_base_model_is_found(make_adapted, tmp_path, word_tokenizer):
    model = make_adapted()
    word_tokenizer.save_pretrained(model.peft_config["default"].base_model_name_or_path)
    folder = write(model, tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(folder)("w3")["input_ids"] == [3]


def test_without_a_tokenizer_the_report_says_so(make_adapted, tmp_path):
    assert not read_report(write(make_adapted(), tmp_path / "out")).tokenizer


@pytest.mark.parametrize("name", AUTO)
def test_the_live_model_is_left_as_it_was(
    make_adapted, tmp_path, snapshot, assert_same, name, use_dora
):
    model = make_adapted(name, use_dora=use_dora)
    model.train()
    before = snapshot(model)
    write(model, tmp_path / "out", dtype="bfloat16")
    assert_same(before, snapshot(model))


def test_embeddings_that_were_tied_part_where_only_one_is_adapted(
    make_adapted, tmp_path, logits_of
):
    with pytest.warns(UserWarning, match="tie"):
        model = make_adapted(
            base={"tie_word_embeddings": True}, target_modules=["q_proj", "lm_head"], ranks=(3,)
        )
    live = model.get_base_model()
    assert live.lm_head.base_layer.weight is live.model.embed_tokens.weight
    loaded = AUTO["llama"].from_pretrained(write(model, tmp_path / "out"))
    assert (logits_of(loaded) - logits_of(model)).abs().max() <= 1e-5
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    assert live.config.tie_word_embeddings


def test_a_wrong_merge_is_caught_and_nothing_is_left(make_adapted, tmp_path, monkeypatch):
    rows = merged_module.effective_rows
    monkeypatch.setattr(merged_module, "effective_rows", lambda *a: 1.001 * rows(*a))
    with pytest.raises(ExportError, match="the merged model differs from the live one"):
        write(make_adapted(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_corrupted_weight_is_caught_and_nothing_is_left(make_adapted, tmp_path, monkeypatch):
    save = transformers.LlamaForCausalLM.save_pretrained

    def save_wrongly(self, folder, **arguments):
        with torch.no_grad():
            norm = self.model.norm
            norm.weight = nn.Parameter(norm.weight.clone())
            norm.weight[3] += 1e-6
            save(self, folder, **arguments)
            norm.weight[3] -= 2e-6

    monkeypatch.setattr(transformers.LlamaForCausalLM, "save_pretrained", save_wrongly)
    with pytest.raises(ExportError, match=r"the weight 'model\.norm\.weight' that transformers"):
        write(make_adapted(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_something_else_is_not_replaced_and_an_older_export_is(make_adapted, tmp_path):
    model = make_adapted()
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ExportError, match="so it is not replaced"):
        write(model, tmp_path)
    write(model, tmp_path / "out", max_shard_size="4KB")
    folder = write(model, tmp_path / "out")
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]


def test_a_base_that_is_not_of_transformers_is_refused(tmp_path, mixed):
    with pytest.raises(ExportError, match="merged writes models of transformers"):
        write(mixed(), tmp_path / "out")


def test_a_quantised_base_is_refused(make_adapted, tmp_path, monkeypatch):
    monkeypatch.setattr(merged_module, "dense_weight", lambda layer: layer.weight.clone())
    with pytest.raises(ExportError, match="quantised weight, into which a merge would round"):
        write(make_adapted(), tmp_path / "out")
