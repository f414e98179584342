"""Bases in 4 bits: what is quantised, and that they train and evaluate in turns."""

from collections import Counter

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from rankflow.ablation import bases
from rankflow.ablation.bases import load_base
from rankflow.adapters.base_weight import base_rows
from rankflow.adapters.sites import find_sites
from rankflow.errors import RankFlowError
from rankflow.specs.run import ModelSpec
from rankflow.training.adapter import add_adapter
from rankflow.training.models import load_base_model

Linear4bit = pytest.importorskip("bitsandbytes").nn.Linear4bit

VOCABULARY = 20
LABELS = ("no", "perhaps", "yes")
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
}
BERT = BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
LLAMA = LlamaConfig(**SIZES, num_key_value_heads=2)


@pytest.fixture
def save(tmp_path):
    def save_model(model):
        vocabulary = {"[PAD]": 0, "[UNK]": 1} | {f"w{i}": i for i in range(2, VOCABULARY)}
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]")
        model.save_pretrained(tmp_path)
        fast.save_pretrained(tmp_path)
        return str(tmp_path)

    return save_model


@pytest.fixture
def token_classifier(save):
    folder = save(BertModel(BERT))
    return ModelSpec(name=folder, task="sequence-classification", pooling="mean"), LABELS


@pytest.fixture
def language_model(save):
    return ModelSpec(name=save(LlamaForCausalLM(LLAMA)), task="causal-lm"), ()


@pytest.fixture(params=["token_classifier", "language_model"])
def task(request):
    """A spec of each kind, and its labels."""
    return request.getfixturevalue(request.param)


def draw_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, VOCABULARY, (4, 8), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids % 3}


def kinds(model):
    return Counter(type(m).__name__ for m in model.modules() if isinstance(m, nn.Linear))


def test_a_base_in_its_own_precision_is_the_runs_own(task):
    ours, theirs = load_base(*task, quantised=False), load_base_model(*task)
    assert kinds(ours.model).keys() == {"Linear"}
    assert ours.full_modules == theirs.full_modules
    same = {n: p for n, p in theirs.model.named_parameters() if not n.startswith("classifier")}
    for name, parameter in ours.model.named_parameters():
        if name in same:
            torch.testing.assert_close(parameter, same[name], rtol=0, atol=0)


def test_all_linear_layers_but_the_head_are_in_4_bits(task):
    base = load_base(*task, quantised=True)
    inside = 6 if base.full_modules else 7  # of each block: BERT's, Llama's
    assert kinds(base.model) == {"Linear4bit": 2 * inside, "Linear": 1}
    others = [
        p
        for m in base.model.modules()
        if not isinstance(m, Linear4bit)
        for p in m.parameters(recurse=False)
    ]
    assert {p.dtype for p in others} == {torch.float32}
    layer = next(m for m in base.model.modules() if isinstance(m, Linear4bit))
    assert layer.compute_dtype == torch.bfloat16
    assert layer.weight.quant_type == "nf4"
    assert layer.weight.compress_statistics


def test_heads_and_norms_are_float32_whatever_the_type_of_the_base(task):
    spec, labels = task
    base = load_base(spec.model_copy(update={"dtype": "bfloat16"}), labels, quantised=True)
    assert {p.dtype for n, p in base.model.named_parameters() if "norm" in n.lower()} == {
        torch.float32
    }
    assert base.model.dtype == torch.float32


def test_a_pooler_is_not_quantised(save):
    spec = ModelSpec(name=save(BertForSequenceClassification(BERT)), task="sequence-classification")
    base = load_base(spec, LABELS, quantised=True)
    assert type(base.model.bert.pooler.dense) is nn.Linear
    assert type(base.model.classifier) is nn.Linear
    assert kinds(base.model)["Linear4bit"] == 12


def test_the_4_bit_weights_are_near_those_of_the_checkpoint(task):
    whole = dict(load_base(*task, quantised=False).model.named_modules())
    model = get_peft_model(
        load_base(*task, quantised=True).model,
        LoraConfig(target_modules=["query", "key", "q_proj", "down_proj"]),
    )
    for site in find_sites(model):
        expected = whole[site.name].weight
        error = (base_rows(site.layer) - expected).norm() / expected.norm()
        assert 0.01 < error < 0.15  # 16 levels of a normal distribution


@pytest.mark.parametrize("use_dora", [False, True], ids=["LoRA", "DoRA"])
def test_it_trains_after_every_evaluation(use_dora, task):
    spec, labels = task
    adapter = {"r": 4, "use_dora": use_dora, "target_modules": "all-linear"}
    model = add_adapter(load_base(spec, labels, quantised=True), spec, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = draw_batch()
    losses = []
    for _ in range(6):
        with torch.no_grad():
            judged = model.eval()(**batch).loss.item()
        loss = model.train()(**batch).loss
        assert judged == pytest.approx(loss.item(), abs=2e-2)
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_gradients_flow_through_4_bits_after_an_evaluation(task):
    """On CPUs with AVX512-BF16 a layer that has been evaluated passes none back by default."""
    spec, labels = task
    batch = draw_batch()

    def gradients(evaluate_first):
        torch.manual_seed(0)
        base = load_base(spec, labels, quantised=True)
        # The lowest adapter learns through all the layers above it.
        model = add_adapter(base, spec, {"r": 2, "target_modules": "all-linear"})
        if evaluate_first:
            with torch.no_grad():
                model.eval()(**batch)
        model.train()(**batch).loss.backward()
        return [p.grad for n, p in model.named_parameters() if ".lora_B" in n]

    for fresh, evaluated in zip(gradients(False), gradients(True), strict=True):
        assert torch.any(fresh)
        torch.testing.assert_close(evaluated, fresh, rtol=1e-5, atol=1e-7)


def test_stock_dora_finds_the_same_norms_after_an_evaluation(language_model):
    spec, labels = language_model
    base = load_base(spec, labels, quantised=True)
    model = add_adapter(base, spec, {"r": 2, "use_dora": True, "target_modules": "all-linear"})
    batch = draw_batch()
    before = model.train()(**batch).logits
    with torch.no_grad():
        model.eval()(**batch)
    torch.testing.assert_close(model.train()(**batch).logits, before, rtol=0, atol=0)


def test_checkpointing_changes_no_gradient(language_model):
    spec, labels = language_model
    batch = draw_batch()
    grads = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = load_base(spec, labels, quantised=True)
        if checkpointing:
            base.model.activation_checkpointing_enable({"use_reentrant": False})
        model = add_adapter(base, spec, {"r": 2, "target_modules": "all-linear"}).train()
        model(**batch).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[1], grads[0])


def test_without_bitsandbytes_the_command_that_installs_it_is_named(monkeypatch, task):
    monkeypatch.setattr(bases.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RankFlowError, match=r"pip install bitsandbytes"):
        load_base(*task, quantised=True)
