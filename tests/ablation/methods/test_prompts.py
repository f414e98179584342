from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import (
    BertConfig,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForTokenClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rankflow.ablation.methods.method import Setting, UnsupportedError
from rankflow.ablation.methods.prompts import PROMPTS
from rankflow.specs.run import ModelSpec
from rankflow.training.models import BaseModel

VIRTUAL = 3


def build(name, case, dtype=torch.float32):
    return PROMPTS[name].build(case.base(dtype), case.setting(), VIRTUAL).model


def padded(case):
    batch = case.batch()
    batch["attention_mask"][1, 4:] = 0
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("name", PROMPTS)
def test_the_logits_of_the_text_are_the_last_ones(host_cases, name):
    """What stands in a padded place does not matter to them, and what stands in a text does."""
    case = host_cases["token classifier"]
    model = build(name, case).eval()
    batch = padded(case)
    before = model(**batch).logits
    assert before.shape == (4, {"prompt": 6 + VIRTUAL, "prefix": 6}[name], 3)
    batch["input_ids"][1, 4:] = (batch["input_ids"][1, 4:] + 1) % 13
    after = model(**batch).logits[:, -6:]
    torch.testing.assert_close(after[1, :4], before[:, -6:][1, :4])
    batch["input_ids"][0, 5] = (batch["input_ids"][0, 5] + 1) % 13
    changed = (model(**batch).logits[:, -6:] - after).abs().amax(dim=2)[0]
    assert changed.argmax() == 5


def test_a_prompt_is_embedded_before_the_text(host_cases):
    case = host_cases["token classifier"]
    model = build("prompt", case).eval()
    batch = padded(case)
    prompt = model.prompt_encoder["default"].embedding.weight
    words = case.base().model.bert.embeddings.word_embeddings(batch["input_ids"])
    embedded = torch.cat((prompt.expand(4, -1, -1), words), dim=1)
    mask = functional.pad(batch["attention_mask"], (VIRTUAL, 0), value=1)
    base = case.base().model.eval()
    expected = base(inputs_embeds=embedded, attention_mask=mask).logits
    torch.testing.assert_close(model(**batch).logits, expected)


def test_a_prompt_starts_at_embeddings_of_the_vocabulary(host_cases):
    case = host_cases["language model"]
    prompt = build("prompt", case).prompt_encoder["default"].embedding.weight
    vocabulary = case.base().model.get_input_embeddings().weight
    assert all((vocabulary == vector).all(dim=1).any() for vector in prompt)


def test_a_prefix_stands_before_the_keys_and_values_of_every_layer():
    """A layer of BERT, written out: its norms and its feed-forward part are the model's own."""
    config = BertConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        attn_implementation="eager",
    )
    host = BertForTokenClassification(config).double().eval()
    spec = ModelSpec(name="minilm", task="sequence-classification", pooling="mean")
    base = BaseModel(host, None, (), ("classifier",))
    setting = make_setting(spec)
    model = PROMPTS["prefix"].build(base, setting, VIRTUAL).model.double().eval()
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(13, (2, 5), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 3:] = 0

    prefix = model.prompt_encoder["default"].embedding.weight.view(VIRTUAL, 2, 2, 2, 4)
    # (virtual, layer, key or value, head, width)
    bert = host.bert
    positions = torch.arange(5)[None] + VIRTUAL
    hidden = bert.embeddings(input_ids=ids, position_ids=positions)
    seen = functional.pad(mask, (VIRTUAL, 0), value=1).bool()[:, None, None]
    for index, layer in enumerate(bert.encoder.layer):
        attention = layer.attention.self
        query, key, value = (
            linear(hidden).view(2, 5, 2, 4).transpose(1, 2)
            for linear in (attention.query, attention.key, attention.value)
        )
        keys, values = (
            torch.cat((prefix[:, index, kind].transpose(0, 1).expand(2, -1, -1, -1), own), dim=2)
            for kind, own in ((0, key), (1, value))
        )
        weights = (query @ keys.mT / 2).masked_fill(~seen, -torch.inf).softmax(dim=-1)
        context = (weights @ values).transpose(1, 2).reshape(2, 5, 8)
        hidden = layer.attention.output(context, hidden)
        hidden = layer.output(layer.intermediate(hidden), hidden)
    expected = model.base_model.classifier(hidden)
    torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, expected)


def make_setting(spec, **options):
    return Setting(spec, {"target_modules": "all-linear"}, 100, 10, 0, options, max_length=6)


def test_the_text_keeps_its_positions(host_cases):
    for name, method in PROMPTS.items():
        case = host_cases["token classifier"]  # 16 positions
        assert method.sizes(case.base(), case.setting()) == range(1, 11), name
        with pytest.raises(UnsupportedError, match="16 positions"):
            method.sizes(case.base(), case.setting(max_length=16))


@pytest.mark.parametrize("name", PROMPTS)
def test_as_many_virtual_tokens_as_there_are_sizes_fit(host_cases, name):
    case = host_cases["token classifier"]
    setting = case.setting()
    largest = PROMPTS[name].sizes(case.base(), setting)[-1]
    model = PROMPTS[name].build(case.base(), setting, largest).model
    model(**padded(case))
    over = PROMPTS[name].build(case.base(), setting, largest + 1).model
    with pytest.raises((RuntimeError, IndexError)):
        over(**padded(case))


def test_an_attention_that_takes_no_keys_from_outside_has_no_prefix():
    config = DistilBertConfig(vocab_size=13, dim=16, hidden_dim=24, n_layers=1, n_heads=2)
    base = BaseModel(DistilBertForTokenClassification(config), None, (), ("classifier",))
    setting = make_setting(ModelSpec(name="minilm", task="token-classification"))
    with pytest.raises(UnsupportedError, match="no keys and values from outside"):
        PROMPTS["prefix"].sizes(base, setting)


def test_a_prompt_is_refused_where_labels_or_ids_would_go_astray(host_cases):
    case = host_cases["token classifier"]
    tokens = replace(case.setting(), model=ModelSpec(name="minilm", task="token-classification"))
    with pytest.raises(UnsupportedError, match="labels of single tokens"):
        PROMPTS["prompt"].sizes(case.base(), tokens)
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_labels=3,
    )
    base = BaseModel(LlamaForSequenceClassification(config), None, (), ("score",))
    whole = make_setting(ModelSpec(name="minilm", task="sequence-classification"))
    with pytest.raises(UnsupportedError, match="finds the last token"):
        PROMPTS["prompt"].sizes(base, whole)
    assert PROMPTS["prefix"].sizes(base, whole)
