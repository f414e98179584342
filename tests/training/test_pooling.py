import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from rankflow.training.pooling import pool

LENGTHS = (5, 3, 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=4,
    )
    model = BertForTokenClassification(config).double().eval()
    torch.nn.init.normal_(model.classifier.bias)
    return model


@pytest.fixture
def batch():
    ids = torch.randint(1, 20, (len(LENGTHS), max(LENGTHS)))
    mask = torch.tensor([[1] * n + [0] * (max(LENGTHS) - n) for n in LENGTHS])
    return {"input_ids": ids, "attention_mask": mask}


def head_on(model, features):
    weight = model.classifier.weight.detach().numpy()
    return features @ weight.T + model.classifier.bias.detach().numpy()


def hidden_states(model, batch):
    with torch.no_grad():
        return model.bert(**batch).last_hidden_state.numpy()


def pooled_logits(model, batch, pooling):
    with torch.no_grad():
        return pool(model(**batch).logits, batch["attention_mask"], pooling).numpy()


def test_the_mean_of_token_logits_is_a_linear_head_on_the_mean_hidden_state(model, batch):
    hidden = hidden_states(model, batch)
    means = np.stack([states[:n].mean(axis=0) for states, n in zip(hidden, LENGTHS, strict=True)])
    difference = pooled_logits(model, batch, "mean") - head_on(model, means)
    assert np.abs(difference).max() < 1e-14


def test_cls_pooling_is_a_linear_head_on_the_first_token(model, batch):
    expected = head_on(model, hidden_states(model, batch)[:, 0])
    assert np.abs(pooled_logits(model, batch, "cls") - expected).max() < 1e-14


def test_padding_on_the_left_pools_like_padding_on_the_right():
    values = torch.randn(1, 3, 2)
    padded = torch.cat([torch.full((1, 2, 2), 1e6), values], dim=1)
    mask = torch.tensor([[0, 0, 1, 1, 1]])
    for pooling in ("mean", "cls"):
        expected = pool(values, torch.ones(1, 3), pooling)
        torch.testing.assert_close(pool(padded, mask, pooling), expected)


def test_half_precision_values_are_averaged_in_float32():
    values = torch.full((1, 3000, 1), 1.0, dtype=torch.bfloat16)
    pooled = pool(values, torch.ones(1, 3000), "mean")
    assert pooled.dtype == torch.float32
    assert pooled.item() == 1.0
