"""Tiny hosts of every task that an ablation has, with a batch to learn by heart."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rankflow.ablation.methods.method import Setting
from rankflow.specs.run import ModelSpec
from rankflow.training.models import BaseModel

BERT = BertConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=16,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    num_labels=3,
)
LLAMA = LlamaConfig(
    vocab_size=13,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=16,
)


@dataclass(frozen=True)
class HostCase:
    """A kind of base model, and the labels that its task has."""

    make: Callable[[], nn.Module]
    full_modules: tuple[str, ...]
    labels: tuple[int, ...]  # shape
    spec: ModelSpec

    def setting(self, parameters=1000, steps=10, options=None, max_length=6, **adapter):
        adapter = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **adapter}
        return Setting(
            self.spec, adapter, parameters, steps, 0, options or {}, max_length=max_length
        )

    def base(self, dtype=torch.float32):
        torch.manual_seed(0)
        return BaseModel(self.make().to(dtype), None, (), self.full_modules)

    def batch(self):
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(13, (4, 6), generator=generator)
        labels = torch.randint(3, self.labels, generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


HOSTS = {
    "token classifier": HostCase(
        lambda: BertForTokenClassification(BERT),
        ("classifier",),
        (4, 6),
        ModelSpec(name="minilm", task="sequence-classification", pooling="mean"),
    ),
    "classifier with a new pooler": HostCase(
        lambda: BertForSequenceClassification(BERT),
        ("bert.pooler", "classifier"),
        (4,),
        ModelSpec(name="minilm", task="sequence-classification"),
    ),
    "language model": HostCase(
        lambda: LlamaForCausalLM(LLAMA), (), (4, 6), ModelSpec(name="minilm", task="causal-lm")
    ),
}


@pytest.fixture(autouse=True)
def own_precision():
    """Let each test's Trainers choose their precision, which accelerate keeps for a process."""
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(params=HOSTS.values(), ids=HOSTS.keys())
def host_case(request):
    """Every kind of host in turn."""
    return request.param


@pytest.fixture
def host_cases():
    """Every kind of host by name."""
    return HOSTS


@pytest.fixture
def setting():
    """What the methods here do not look at."""
    spec = ModelSpec(name="minilm", task="token-classification")
    return Setting(spec, {"target_modules": "all-linear"}, 1000, 10, 0, {})


@pytest.fixture
def train():
    """Train whatever has ``requires_grad`` on one batch, and return the losses."""

    def run(model, batch, rate, steps=12, autocast=False):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        losses = []
        for _ in range(steps):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**batch).loss
            loss.backward()
            assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    return run


@pytest.fixture
def trained_names():
    """Name everything that trains."""
    return lambda model: {n for n, p in model.named_parameters() if p.requires_grad}


@pytest.fixture
def transposed():
    """A base model whose linear layers store their weights as (in, out)."""
    config = GPT2Config(
        vocab_size=13, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    return BaseModel(GPT2LMHeadModel(config), None, (), ())
