import pytest
import torch

from rankflow.ablation.methods.full import FullFineTuning

METHOD = FullFineTuning()


def test_everything_trains_and_the_loss_falls(host_case, setting, train, trained_names):
    base = host_case.base()
    assert METHOD.sizes(base, setting) == ()
    built = METHOD.build(base, setting, None)
    assert trained_names(built.model) == {n for n, _ in built.model.named_parameters()}
    losses = train(built.model, host_case.batch(), METHOD.rate * 10)
    assert losses[-1] < losses[0] - 0.1


def test_the_merged_model_is_a_copy_of_the_same_kind(host_case, setting, train):
    built = METHOD.build(host_case.base(), setting, None)
    batch = host_case.batch()
    train(built.model, batch, 1e-2, steps=2)
    merged = built.merge()
    assert type(merged) is type(built.model)
    expected = built.model(**batch).logits.detach().clone()
    train(built.model, batch, 1e-2, steps=1)  # the copy does not follow
    torch.testing.assert_close(merged(**batch).logits, expected, rtol=0, atol=0)


def test_a_float32_base_needs_no_finish(host_case, setting):
    assert METHOD.build(host_case.base(), setting, None).finish is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_base_trains_in_float32_and_ends_as_it_was(dtype, host_cases, setting):
    base = host_cases["language model"].base(dtype)
    base.model.model.norm.float()  # as models do that keep some weights wide
    # Transformers computes rotary frequencies in float32 in a model of any type.
    rotary = base.model.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.float() + 1e-4
    before = {n: p.clone() for n, p in base.model.named_parameters()}
    frequencies = rotary.inv_freq.clone()
    built = METHOD.build(base, setting, None)
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter.add_(2.0**-12)
    built.finish()
    after = dict(built.model.named_parameters())
    assert {n: p.dtype for n, p in after.items()} == {n: p.dtype for n, p in before.items()}
    expected = {n: (p.float() + 2.0**-12).to(p.dtype) for n, p in before.items()}
    for name, parameter in after.items():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=0, atol=0)
    torch.testing.assert_close(rotary.inv_freq, frequencies, rtol=0, atol=0)
