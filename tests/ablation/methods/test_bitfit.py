import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankflow.ablation.methods.bitfit import BitFit
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.training.models import BaseModel

METHOD = BitFit()


def build_whole(case, setting):
    base = case.base()
    return METHOD.build(base, setting, METHOD.sizes(base, setting)[-1])


def heads(model, case):
    return {n for n, _ in model.named_parameters() if n.startswith(case.full_modules or ("none",))}


def test_exactly_the_biases_and_the_head_train(host_case, setting, trained_names):
    model = build_whole(host_case, setting).model
    inside = trained_names(model) - heads(model, host_case)
    assert inside == {n for n, _ in model.named_parameters() if n.endswith(".bias")} - heads(
        model, host_case
    )
    assert heads(model, host_case) <= trained_names(model)


def test_the_biases_of_bert_are_counted_by_hand(host_cases, setting):
    for name in ("token classifier", "classifier with a new pooler"):
        case = host_cases[name]
        model = build_whole(case, setting).model
        trained = sum(
            p.numel()
            for n, p in model.named_parameters()
            if p.requires_grad and n not in heads(model, case)
        )
        hidden, inner, blocks = 16, 24, 2
        # q, k, v, o, the last layer of the MLP and two normalisations; one more on the embeddings
        assert trained == blocks * (7 * hidden + inner) + hidden


def test_linear_layers_without_a_bias_get_one_that_starts_at_zero(host_cases, setting):
    case = host_cases["language model"]
    batch = case.batch()
    before = case.base().model(**batch).logits
    model = build_whole(case, setting).model
    torch.testing.assert_close(model(**batch).logits, before, rtol=0, atol=0)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(not torch.any(p) for p in trained.values())
    hidden, keys, inner, blocks = 16, 8, 24, 2
    # q, o, k, v, gate, up, down; neither the normalisations nor the head have a bias
    assert sum(p.numel() for p in trained.values()) == blocks * (3 * hidden + 2 * keys + 2 * inner)


def test_it_starts_as_the_base(host_case, setting):
    batch = host_case.batch()
    expected = host_case.base().model.eval()(**batch).logits
    model = build_whole(host_case, setting).model.eval()
    torch.testing.assert_close(model(**batch).logits, expected, rtol=0, atol=0)


def test_it_learns_and_leaves_all_else_alone(host_case, setting, train, trained_names):
    built = build_whole(host_case, setting)
    frozen = {n: p.clone() for n, p in built.model.named_parameters() if not p.requires_grad}
    losses = train(built.model, host_case.batch(), METHOD.rate * 4)
    assert losses[-1] < losses[0] - 0.05
    for name, parameter in built.model.named_parameters():
        if name in frozen:
            torch.testing.assert_close(parameter, frozen[name], rtol=0, atol=0)


def test_sizes_nest_from_the_output_down(host_case, setting, trained_names):
    nested = [set()]
    for size in METHOD.sizes(host_case.base(), setting):
        model = METHOD.build(host_case.base(), setting, size).model
        nested.append(trained_names(model) - heads(model, host_case))
        assert len(nested[size]) == size
        assert nested[size - 1] < nested[size]
    nearest = {"model.layers.1.mlp.down_proj.bias", "bert.encoder.layer.1.output.LayerNorm.bias"}
    assert nested[1] < nearest


def test_new_biases_train_under_checkpointing_and_survive_a_state_dict(host_cases, setting, train):
    case = host_cases["language model"]
    built = build_whole(case, setting)
    built.model.activation_checkpointing_enable()
    losses = train(built.model, case.batch(), 2e-2)
    assert losses[-1] < losses[0]
    other = build_whole(case, setting).model
    other.load_state_dict(built.model.state_dict())
    batch = case.batch()
    torch.testing.assert_close(other(**batch).logits, built.merge()(**batch).logits)


def test_a_narrow_base_trains_in_float32_and_ends_as_it_was(host_cases, setting):
    base = host_cases["language model"].base(torch.bfloat16)
    built = METHOD.build(base, setting, 3)
    assert {p.dtype for p in built.model.parameters() if p.requires_grad} == {torch.float32}
    built.finish()
    assert {p.dtype for p in built.model.parameters()} == {torch.bfloat16}


def test_it_can_be_counted_without_numbers(host_case, setting):
    with torch.device("meta"):
        base = host_case.base()
    model = METHOD.build(base, setting, METHOD.sizes(base, setting)[-1]).model
    real = build_whole(host_case, setting).model
    assert {n: p.shape for n, p in model.named_parameters() if p.requires_grad} == {
        n: p.shape for n, p in real.named_parameters() if p.requires_grad
    }


def test_a_model_without_biases_and_linear_layers_is_refused(setting):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(3, 2)

        def get_output_embeddings(self):
            return None

    with pytest.raises(UnsupportedError, match="Table has neither a layer with a bias"):
        METHOD.sizes(BaseModel(Table(), None, (), ()), setting)


def test_transposed_linear_layers_have_biases_too(transformer, setting):
    model = transformer()
    expected = sum(
        isinstance(m, nn.Linear | nn.LayerNorm | Conv1D) and m is not model.get_output_embeddings()
        for m in model.modules()
    )
    assert len(METHOD.sizes(BaseModel(model, None, (), ()), setting)) == expected
