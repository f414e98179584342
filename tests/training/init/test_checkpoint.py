import json
from pathlib import Path

import pytest
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    RobertaConfig,
    RobertaModel,
    ViTConfig,
)

from rankflow.errors import SpecError
from rankflow.training.init.checkpoint import read_checkpoint

TINY = {
    "vocab_size": 11,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
SHAPES = {
    "bert": (lambda: BertForMaskedLM(BertConfig(**TINY)), "encoder", "mean", 32),
    "bert with a head": (
        lambda: BertForSequenceClassification(BertConfig(**TINY)),
        "encoder",
        "model",
        32,
    ),
    "bert that decodes": (
        lambda: BertLMHeadModel(BertConfig(**TINY, is_decoder=True)),
        "decoder",
        "model",
        32,
    ),
    "roberta": (lambda: RobertaModel(RobertaConfig(**TINY)), "encoder", "mean", 30),
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=24)
        ),
        "decoder",
        "model",
        24,
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_model_is_told_from_its_files(shape, bert_folder):
    make, family, pooling, positions = SHAPES[shape]
    model = make()
    model.save_pretrained(bert_folder)
    found = read_checkpoint(bert_folder, None)
    assert (found.family, found.pooling, found.positions) == (family, pooling, positions)
    assert found.parameters == pytest.approx(model.num_parameters(), rel=0.02)  # tied ones count
    assert found.dtype == "float32"
    assert found.tokenizer("a film")["input_ids"] == [2, 8, 9, 3]


def test_a_model_that_writes_what_it_read_anew_is_told(bart_folder, llama_folder):
    assert read_checkpoint(bart_folder, None).family == "encoder-decoder"
    assert read_checkpoint(llama_folder, None).family == "decoder"


def test_a_configuration_alone_says_no_size(bert_folder):
    (Path(bert_folder) / "model.safetensors").unlink()
    ModernBertConfig(**TINY).save_pretrained(bert_folder)
    found = read_checkpoint(bert_folder, None)
    assert (found.family, found.parameters, found.dtype) == ("encoder", None, None)


@pytest.mark.parametrize("is_first", [False, True])
def test_sentence_embeddings_say_how_they_pool(is_first, bert_folder):
    folder = Path(bert_folder) / "1_Pooling"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"pooling_mode_cls_token": is_first}))
    assert read_checkpoint(bert_folder, None).pooling == ("cls" if is_first else "mean")


def test_a_chat_template_takes_the_place_of_the_tokenizers_own(chat_folder, tmp_path):
    assert "im_start" in read_checkpoint(chat_folder, None).tokenizer.chat_template
    (tmp_path / "chat.jinja").write_text("{{ messages }}")
    found = read_checkpoint(chat_folder, tmp_path / "chat.jinja")
    assert found.tokenizer.chat_template == "{{ messages }}"
    with pytest.raises(SpecError, match=r"--chat-template none\.jinja: no such file"):
        read_checkpoint(chat_folder, Path("none.jinja"))


def test_what_is_no_model_of_text_is_refused(bert_folder, tmp_path):
    with pytest.raises(SpecError, match=r"--model .*empty: .*a folder with a model and its token"):
        read_checkpoint(str(tmp_path / "empty"), None)
    ViTConfig().save_pretrained(bert_folder)
    with pytest.raises(SpecError, match="'vit' is no language model; rankflow train takes"):
        read_checkpoint(bert_folder, None)
