import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from peft import (
    LoraConfig,
    OFTConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    VeraConfig,
    get_peft_model,
)
from torch import nn
from transformers import (
    BertConfig,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankflow.ablation.measures.forgetting import measure_forgetting
from rankflow.ablation.measures.general_data import GeneralTexts, ScoredPairs
from rankflow.errors import RankFlowError

PAIRS = ScoredPairs(
    ("a b", "c", "d e f g h", "a", "b b b", "i h g", "a b", "e"),
    ("a b c", "d d", "d e", "i", "b", "a c e g i", "g", "f e d"),
    (4.0, 1.5, 3.0, 0.5, 5.0, 1.5, 2.0, 2.5),
)
TEXTS = GeneralTexts(("a b c d e", "f", "g h", "i a i a i a i a i", "c c c b"))
LINEAR = ["query", "key", "value", "dense"]
SIZES = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert():
    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        max_position_embeddings=24,
        num_labels=3,
        initializer_range=0.3,  # or nothing but the embeddings would matter
        **SIZES,
    )  # with dropout, which must be off
    return BertForTokenClassification(config)


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=13, hidden_size=16, use_cache=False, **SIZES))


def gpt2():
    config = GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=24)
    config.use_cache = False
    return GPT2LMHeadModel(config)


def adapted(base, config, task):
    config.task_type = task
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


class Bottleneck(nn.Module):
    def __init__(self):
        super().__init__()
        self.change = nn.Linear(16, 16)

    def forward(self, hidden):
        return hidden + torch.tanh(self.change(hidden))


def with_bottlenecks(base):
    for layer in base.bert.encoder.layer:
        layer.output.dense.adapter = Bottleneck()
        layer.output.dense.register_forward_hook(lambda m, _, output: m.adapter(output))
    return base


def ranks(values):
    """Ranks from 1, ties sharing the mean of theirs."""
    return [1 + sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 for v in values]


def spearman(x, y):
    x, y = (np.array(ranks(list(v))) - (len(v) + 1) / 2 for v in (x, y))
    return float((x * y).sum() / math.sqrt((x**2).sum() * (y**2).sum()))


ENCODERS = {
    "base": bert,
    "LoRA": lambda: adapted(bert(), LoraConfig(r=2, target_modules=LINEAR), TaskType.TOKEN_CLS),
    "VeRA": lambda: adapted(bert(), VeraConfig(r=4, target_modules=LINEAR), TaskType.TOKEN_CLS),
    "OFT": lambda: adapted(
        bert(), OFTConfig(oft_block_size=4, target_modules=LINEAR), TaskType.TOKEN_CLS
    ),
    "bottleneck": lambda: with_bottlenecks(bert()),
}


def hidden_of(model, tokens):
    """Last hidden states of one text, by way of the encoder inside."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return inner.bert(input_ids=tokens).last_hidden_state[0]


def similarity(pairs, tokenizer, pool, embed):
    cosines = []
    for texts in zip(pairs.first, pairs.second, strict=True):
        x, y = (pool(embed(torch.tensor([tokenizer(text)["input_ids"]]))) for text in texts)
        cosines.append(float(x @ y / (x.norm() * y.norm())))
    return spearman(cosines, pairs.scores)


@pytest.mark.parametrize("make", ENCODERS.values(), ids=ENCODERS)
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_similarity_is_that_of_texts_embedded_one_by_one(make, pooling, encoder_tokenizer):
    model = make().double()
    found = measure_forgetting(model, PAIRS, encoder_tokenizer, pooling=pooling, batch_size=3)
    model.eval()
    pools = {"mean": lambda states: states.mean(dim=0), "cls": lambda states: states[0]}
    with torch.no_grad():
        expected = similarity(
            PAIRS, encoder_tokenizer, pools[pooling], lambda tokens: hidden_of(model, tokens)
        )
    assert found == pytest.approx(expected, abs=1e-12)


def test_adapters_change_the_similarity(encoder_tokenizer):
    torch.manual_seed(0)
    before = measure_forgetting(bert(), PAIRS, encoder_tokenizer)
    for name in set(ENCODERS) - {"base"}:
        torch.manual_seed(0)
        assert measure_forgetting(ENCODERS[name](), PAIRS, encoder_tokenizer) != before, name


def test_similarity_under_a_prompt_pools_the_texts_own_tokens(encoder_tokenizer):
    config = PromptTuningConfig(num_virtual_tokens=3, num_layers=2, token_dim=16)
    model = adapted(bert(), config, TaskType.TOKEN_CLS).double()
    found = measure_forgetting(model, PAIRS, encoder_tokenizer, batch_size=3)
    model.eval()
    encoder = model.get_base_model().bert
    prompt = model.prompt_encoder["default"].embedding.weight

    def embed(tokens):
        words = encoder.embeddings.word_embeddings(tokens)
        joined = torch.cat([prompt[None], words], dim=1)
        return encoder(inputs_embeds=joined).last_hidden_state[0, 3:]

    with torch.no_grad():
        expected = similarity(PAIRS, encoder_tokenizer, lambda states: states.mean(dim=0), embed)
    assert found == pytest.approx(expected, abs=1e-12)


def test_longer_texts_are_cut_for_similarity(encoder_tokenizer):
    model = bert()
    cut = ScoredPairs(
        *(tuple(" ".join(t.split()[:2]) for t in side) for side in (PAIRS.first, PAIRS.second)),
        PAIRS.scores,
    )
    short = measure_forgetting(model, PAIRS, encoder_tokenizer, max_length=4)  # two of them special
    assert short == measure_forgetting(model, cut, encoder_tokenizer)
    assert short != measure_forgetting(model, PAIRS, encoder_tokenizer)


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_ruined_encoder_has_no_similarity(value, encoder_tokenizer):
    model = bert()
    for parameter in model.bert.encoder.layer[-1].output.parameters():
        nn.init.constant_(parameter, value)
    nn.init.constant_(model.bert.encoder.layer[-1].output.LayerNorm.bias, value + 1)
    assert math.isnan(measure_forgetting(model, PAIRS, encoder_tokenizer))


DECODERS = {
    "llama": llama,
    "gpt2": gpt2,
    "LoRA": lambda: adapted(
        llama(), LoraConfig(r=2, target_modules="all-linear"), TaskType.CAUSAL_LM
    ),
    "prompt": lambda: adapted(gpt2(), PromptTuningConfig(num_virtual_tokens=3), TaskType.CAUSAL_LM),
    "prefix": lambda: adapted(
        llama(), PrefixTuningConfig(num_virtual_tokens=3), TaskType.CAUSAL_LM
    ),
}


def perplexity(model, pieces):
    """One token after the other, each from a forward pass over those before."""
    nlls = []
    for ids in pieces:
        for end in range(1, len(ids)):
            logits = model(input_ids=torch.tensor([ids[:end]])).logits[0, -1]
            nlls.append(-float(torch.log_softmax(logits, dim=0)[ids[end]]))
    return math.exp(sum(nlls) / len(nlls))


@pytest.mark.parametrize("make", DECODERS.values(), ids=DECODERS)
def test_perplexity_is_that_of_tokens_predicted_one_by_one(make, decoder_tokenizer):
    model = make()
    found = measure_forgetting(model, TEXTS, decoder_tokenizer, batch_size=2)
    model.eval()
    with torch.no_grad():
        expected = perplexity(model, [decoder_tokenizer(text)["input_ids"] for text in TEXTS.texts])
    assert found == pytest.approx(expected, rel=1e-5)


def test_perplexity_loses_nothing_of_a_long_text(decoder_tokenizer):
    model = llama().eval()
    found = measure_forgetting(model, TEXTS, decoder_tokenizer, max_length=4)
    pieces = []
    for text in TEXTS.texts:
        ids = decoder_tokenizer(text)["input_ids"]
        edges = [*range(0, len(ids), 4), len(ids)]
        pieces += [ids[start:end] for start, end in pairwise(edges)]
    with torch.no_grad():
        assert found == pytest.approx(perplexity(model, pieces), rel=1e-5)


def test_a_ruined_decoder_has_an_infinite_perplexity_or_none(decoder_tokenizer):
    model = llama()
    model.lm_head.weight.data *= 1e6
    assert measure_forgetting(model, TEXTS, decoder_tokenizer) == math.inf
    model.lm_head.weight.data *= math.nan
    assert math.isnan(measure_forgetting(model, TEXTS, decoder_tokenizer))


def test_texts_of_one_token_have_nothing_to_predict(decoder_tokenizer):
    with pytest.raises(RankFlowError, match="no text has the two tokens"):
        measure_forgetting(llama(), GeneralTexts(("a", "b")), decoder_tokenizer)


@pytest.mark.parametrize("data", [PAIRS, TEXTS], ids=["similarity", "perplexity"])
def test_the_model_stays_in_training_mode(data, encoder_tokenizer, decoder_tokenizer):
    model, tokenizer = (bert(), encoder_tokenizer) if data is PAIRS else (gpt2(), decoder_tokenizer)
    model.train()
    state = torch.get_rng_state()
    first, second = (measure_forgetting(model, data, tokenizer) for _ in range(2))
    assert first == second
    assert all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
