import copy
import math

import pytest
import torch
import transformers

CONFIG = {
    "vocab_size": 13,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def bert():
    """A tiny encoder without a head, as MiniLM is."""
    return transformers.BertModel(transformers.BertConfig(**CONFIG))


@pytest.fixture
def base_folder(bert, tmp_path):
    bert.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def classify(bert):
    """Put the encoder into a classifier with a new head."""

    def make(labels=3):
        config = transformers.BertConfig(**CONFIG, num_labels=labels)
        model = transformers.BertForSequenceClassification(config)
        model.bert.load_state_dict(bert.state_dict())
        return model

    return make


@pytest.fixture
def change_rows():
    """Copy a model with each row of some weights turned by an angle and scaled by a factor."""

    def change(model, changes):
        changed = copy.deepcopy(model)
        for site, (angle, factor) in changes.items():
            weight = changed.get_submodule(site).weight.data
            norms = weight.norm(dim=1, keepdim=True)
            unit = weight / norms
            across = torch.randn_like(unit)
            across -= (across * unit).sum(dim=1, keepdim=True) * unit
            across /= across.norm(dim=1, keepdim=True)
            turned = math.cos(angle) * unit + math.sin(angle) * across
            weight.copy_(factor * norms * turned)
        return changed

    return change
