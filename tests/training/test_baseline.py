import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from scipy.optimize import minimize
from scipy.special import log_softmax
from torch import nn
from transformers import AutoModelForTokenClassification, AutoTokenizer

from rankflow.training import baseline
from rankflow.training.baseline import (
    Features,
    LinearHead,
    compute_features,
    fit_baseline,
    fit_heads,
)
from rankflow.training.head import start_head
from rankflow.training.metrics import classification_metrics
from rankflow.training.models import BaseModel
from rankflow.training.tokens import IGNORED, make_collator, tokenize


@pytest.fixture
def clusters():
    """Three overlapping clouds of points with features of very different scale."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(40)
    centres = torch.randn(3, 5, generator=generator)
    noise = torch.randn(120, 5, generator=generator)
    scales = torch.tensor([1e-2, 1.0, 1.0, 10.0, 100.0])
    return Features((centres[labels] + noise) * scales + 3, labels)


def reference_loss(clusters, penalty):
    """The smallest regularised loss, in float64 by another optimiser."""
    values = clusters.values.double().numpy()
    values = (values - values.mean(axis=0)) / (values.std(axis=0, ddof=1) + 1e-6)
    labels = clusters.labels.numpy()

    def loss(flat):
        weight, bias = flat[:15].reshape(3, 5), flat[15:]
        log_p = log_softmax(values @ weight.T + bias, axis=1)
        return -log_p[np.arange(len(labels)), labels].mean() + penalty / 2 * (weight**2).sum()

    return minimize(loss, np.zeros(18), tol=1e-12).fun


@pytest.mark.parametrize("index", range(len(baseline._PENALTIES)))
def test_the_head_is_the_minimum_of_the_penalised_loss(clusters, index):
    head = fit_heads(clusters, 3)[index]
    penalty = baseline._PENALTIES[index]
    weight = head.weight * (clusters.values.std(dim=0) + 1e-6)
    loss = head.measure(clusters)["nll"] + penalty / 2 * weight.square().sum().item()
    assert loss == pytest.approx(reference_loss(clusters, penalty), abs=1e-5)


def test_fitting_twice_gives_the_same_head(clusters):
    first, second = fit_heads(clusters, 3), fit_heads(clusters, 3)
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(first, second, strict=True))


def test_metrics_equal_their_definition():
    logits = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [1.0, 3.0, 2.0]], dtype=np.float32)
    labels = np.array([0, 2, 2])
    probabilities = np.exp(logits.astype(float)) / np.exp(logits.astype(float)).sum(1)[:, None]
    metrics = classification_metrics(logits, labels)
    assert metrics["accuracy"] == pytest.approx(1 / 3)
    assert metrics["nll"] == pytest.approx(-np.log(probabilities[[0, 1, 2], labels]).mean())


def test_metrics_of_large_logits_are_finite():
    metrics = classification_metrics(np.array([[1e4, -1e4]], dtype=np.float32), np.array([1]))
    assert metrics["nll"] == pytest.approx(2e4)


@pytest.fixture
def model(bert_folder):
    return AutoModelForTokenClassification.from_pretrained(bert_folder, num_labels=2).eval()


@pytest.fixture
def tokenizer(bert_folder):
    return AutoTokenizer.from_pretrained(bert_folder)


@pytest.fixture
def splits(tokenizer, sentiment_rows):
    rows = [row | {"label": int(row["label"] == "yes")} for row in sentiment_rows]
    raw = DatasetDict(dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows)))
    return tokenize(raw, tokenizer, "sequence-classification", 16)


def test_features_are_the_pooled_hidden_states_of_each_row(model, tokenizer, splits):
    collate = make_collator(tokenizer, "sequence-classification")
    features = compute_features(model, splits["train"], collate, "mean")
    alone = []
    for row in sorted(splits["train"], key=lambda row: len(row["input_ids"])):
        with torch.no_grad():
            hidden = model.bert(input_ids=torch.tensor([row["input_ids"]])).last_hidden_state
        alone.append(hidden[0].mean(dim=0))
    torch.testing.assert_close(features.values, torch.stack(alone))


def test_every_labelled_word_is_a_feature_for_token_classification(model, tokenizer):
    raw = [{"text": ["a", "films"], "label": [0, 1]}, {"text": ["bad"], "label": [1]}]
    rows = tokenize(
        DatasetDict({"train": Dataset.from_list(raw)}), tokenizer, "token-classification", 16
    )["train"]
    collate = make_collator(tokenizer, "token-classification")
    features = compute_features(model, rows, collate, None)
    assert features.values.shape == (3, 16)
    assert sorted(features.labels.tolist()) == [0, 1, 1]
    assert IGNORED not in features.labels


def test_a_separable_problem_is_solved_on_every_split(model, tokenizer, splits):
    collate = make_collator(tokenizer, "sequence-classification")
    fitted = fit_baseline(model, splits, "test", collate, "mean", 2)
    assert fitted.metrics["accuracy"] == 1.0
    assert fit_baseline(model, splits, None, collate, "mean", 2).metrics == {}


def test_a_new_linear_head_starts_as_the_fitted_one(model, tokenizer, splits):
    collate = make_collator(tokenizer, "sequence-classification")
    fitted = fit_baseline(model, splits, "test", collate, "mean", 2)
    start_head(BaseModel(model, tokenizer, ("classifier",), ("classifier",)), fitted.head)
    assert torch.equal(model.classifier.weight, fitted.head.weight)
    assert torch.equal(model.classifier.bias, fitted.head.bias)


def test_a_head_from_the_checkpoint_or_of_other_shape_stays(model, tokenizer):
    before = model.classifier.weight.clone()
    start_head(
        BaseModel(model, tokenizer, (), ("classifier",)),
        LinearHead(torch.ones(2, 16), torch.ones(2)),
    )
    start_head(
        BaseModel(model, tokenizer, ("classifier",), ("classifier",)),
        LinearHead(torch.ones(2, 9), torch.ones(2)),
    )
    model.classifier = nn.Sequential(model.classifier, nn.Linear(2, 2))
    start_head(
        BaseModel(model, tokenizer, ("classifier",), ("classifier",)),
        LinearHead(torch.ones(2, 16), torch.ones(2)),
    )
    assert torch.equal(model.classifier[0].weight, before)
