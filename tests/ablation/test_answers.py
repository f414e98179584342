"""Judging answers: the exact match is greedy decoding's, the nll that of the answers alone."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaConfig, LlamaForCausalLM

from rankflow.ablation.workload import TextWorkload
from rankflow.specs.run import ModelSpec
from rankflow.training.tokens import IGNORED

PAD, START, END, VOCABULARY = 0, 1, 2, 9


def collate(rows):
    """Pad on the right, as the collator of a language model does."""
    length = max(len(row["input_ids"]) for row in rows)

    def pad(key, value):
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

    return {
        "input_ids": pad("input_ids", PAD),
        "attention_mask": pad("attention_mask", 0),
        "labels": pad("labels", IGNORED),
    }


@pytest.fixture
def model():
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,  # so that it prefers different tokens after different prompts
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=END,
    )
    return LlamaForCausalLM(config).eval()


def decode(model, prompt, most):
    """Return what greedy decoding, a token at a time, says after a prompt."""
    said = []
    while len(said) < most and said[-1:] != [END]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + said])).logits
        said.append(int(logits[0, -1].argmax()))
    return said


def make_rows(model):
    """Prompts whose answers are what the model says, or that with its first or last token wrong."""
    rng = np.random.default_rng(0)
    rows = []
    for i in range(90):
        prompt = [START, *rng.integers(3, VOCABULARY, size=rng.integers(1, 9)).tolist()]
        answer = decode(model, prompt, most=int(rng.integers(1, 5)))
        if i % 3:
            wrong = 0 if i % 3 == 1 else len(answer) - 1
            answer[wrong] = 3 + (answer[wrong] - 2) % (VOCABULARY - 3)
        rows.append((prompt, answer))
    return rows


def make_workload(rows, *, has_targets):
    tokens = [
        {
            "input_ids": prompt + answer,
            "attention_mask": [1] * len(prompt + answer),
            "labels": [IGNORED] * len(prompt) + answer if has_targets else prompt + answer,
        }
        for prompt, answer in rows
    ]
    return TextWorkload(
        model=ModelSpec(name="someone/a-model", task="causal-lm"),
        splits=DatasetDict({"test": Dataset.from_list(tokens)}),
        labels=(),
        has_targets=has_targets,
        collate=collate,
        batch=8,
        memory=None,
    )


def judge(model, rows, *, has_targets=True):
    return make_workload(rows, has_targets=has_targets).judge(model, "test", nullcontext)


def test_accuracy_is_the_exact_match_of_greedy_decoding(model):
    rows = make_rows(model)
    exact = [decode(model, prompt, most=len(answer)) == answer for prompt, answer in rows]
    assert 20 < sum(exact) < 40
    assert judge(model, rows)["accuracy"] == pytest.approx(sum(exact) / len(rows))


@pytest.mark.parametrize("has_targets", [True, False], ids=["answers", "texts"])
def test_every_token_that_is_judged_counts_alike(has_targets, model):
    rows = make_rows(model)
    losses = []
    for prompt, answer in rows:
        ids = prompt + answer
        with torch.no_grad():
            scores = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(1)
        first = len(prompt) if has_targets else 1
        losses += [-scores[i - 1, ids[i]].item() for i in range(first, len(ids))]
    found = judge(model, rows, has_targets=has_targets)
    assert found["nll"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)


def test_without_targets_nothing_is_an_answer(model):
    assert set(judge(model, make_rows(model), has_targets=False)) == {"nll", "perplexity"}
