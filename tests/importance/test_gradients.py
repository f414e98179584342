import copy
import io

import peft
import pytest
import torch
from torch import nn

from rankflow.adapters.sites import find_sites
from rankflow.errors import RankFlowError
from rankflow.importance.gradients import StepGradients


def parameters(steered):
    return [p for p in steered.model.parameters() if p.requires_grad]


def test_a_step_without_gradients_is_an_error_that_says_where_to_call(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    with pytest.raises(RankFlowError, match=r"no gradient on any adapter.*after loss.backward\(\)"):
        gradients.read()
    steered.backward(0)
    assert gradients.read().accept
    steered.model.zero_grad(set_to_none=True)
    with pytest.raises(RankFlowError, match="adapter active and its parameters trainable"):
        gradients.read()


def test_gradients_of_other_parameters_do_not_count(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    steered.model.base_model.model.first.base_layer.weight.grad = torch.ones(5, 5).double()
    with pytest.raises(RankFlowError, match="no gradient"):
        gradients.read()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["A", "B", "magnitude"])
def test_one_bad_number_anywhere_refuses_the_step(value, where, steer, watch):
    steered = steer(use_dora=True)
    gradients = watch(steered.sites)
    for site in steered.sites:
        parameter = getattr(site, where)
        if parameter.numel() == 0:
            continue
        steered.backward(0)
        assert gradients.read().accept
        parameter.grad.view(-1)[-1] = value
        assert not gradients.read().accept


def test_the_magnitude_of_a_dead_site_is_watched(steer, watch):
    steered = steer(use_dora=True)
    gradients = watch(steered.sites)
    steered.backward(0)
    steered.sites[1].magnitude.grad[0] = float("nan")
    assert steered.sites[1].rank == 0
    assert not gradients.read().accept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e25])
def test_a_number_that_was_mended_before_anybody_looked_refuses_the_step(value, steer, watch):
    """Clipping turns a norm that overflows into zeros, and others replace what is not a number."""
    steered = steer()
    gradients = watch(steered.sites)
    steered.backward(0, scale=value)
    for p in parameters(steered):
        p.grad = None if p.grad is None else torch.zeros_like(p.grad)
    assert not gradients.read().accept
    steered.backward(0)
    assert gradients.read().accept


def test_what_is_trained_beside_the_adapter_must_be_finite_too_and_is_told_apart(steer):
    steered = steer()
    head = nn.Parameter(torch.ones(3))
    gradients = StepGradients(steered.sites, [head])
    steered.backward(0)
    head.grad = torch.tensor([1.0, float("nan"), 1.0])
    reading = gradients.read()
    assert not reading.accept
    bad = [o for o, fine in zip(reading.owners, reading.finite.tolist(), strict=True) if not fine]
    assert bad == [None]
    gradients.close()


@pytest.mark.parametrize("accept", [True, False])
def test_a_muted_step_has_zero_gradients_everywhere_and_an_accepted_one_its_own(accept, steer):
    steered = steer(use_dora=True)
    head = nn.Parameter(torch.ones(3))
    gradients = StepGradients(steered.sites, [head])
    steered.backward(0)
    head.grad = torch.full((3,), 2.0 if accept else float("nan"))
    watched = [p for p, _ in gradients.parameters if p.grad is not None]
    before = [p.grad.clone() for p in watched]
    gradients.mute(torch.tensor(accept))
    for p, own in zip(watched, before, strict=True):
        assert torch.equal(p.grad, own if accept else torch.zeros_like(own))
    gradients.close()


@pytest.mark.parametrize("factor", [1.0, 0.37, 1e-6, 12.0])
def test_one_factor_on_all_gradients_is_read_off(factor, steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    steered.backward(0)
    for p in parameters(steered):
        if p.grad is not None:
            p.grad *= factor
    assert gradients.read().unclip.item() == pytest.approx(1 / factor, rel=1e-6)


def test_clipping_is_read_off_the_whole_accumulated_gradient(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    steered.model.zero_grad(set_to_none=True)
    for step in range(3):
        steered.loss(steered.batch(step)).backward()
    norm = nn.utils.clip_grad_norm_(parameters(steered), 1e-3)
    assert gradients.read().unclip.item() == pytest.approx(norm.item() / 1e-3, rel=1e-3)
    # (clip_grad_norm_ divides by the norm plus 1e-6.)


def test_the_factor_is_read_afresh_at_every_step(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    for step, factor in enumerate((0.5, 1.0, 0.125)):
        steered.backward(step)
        for p in parameters(steered):
            p.grad = None if p.grad is None else p.grad * factor
        assert gradients.read().unclip.item() == pytest.approx(1 / factor, rel=1e-6)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_a_loss_scale_that_is_off_again_is_not_taken_for_clipping(as_tensor, steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    steered.backward(0, scale=1024.0)
    for p in parameters(steered):
        p.grad = None if p.grad is None else p.grad / 1024 * 0.25
    scale = torch.tensor(1024.0) if as_tensor else 1024.0
    assert gradients.read(scale).unclip.item() == pytest.approx(4, rel=1e-6)


def test_zero_gradients_need_no_factor(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    steered.backward(0, scale=0.0)
    assert gradients.read().unclip == 1


def test_gradients_that_no_backward_made_need_no_factor(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)
    for p in parameters(steered):
        p.grad = torch.ones_like(p)
    assert gradients.read().unclip == 1


def test_parameters_are_watched_again_after_a_resize(steer, watch, change_ranks):
    steered = steer()
    gradients = watch(steered.sites)
    for site in steered.sites:
        change_ranks(site, 2)
    gradients.watch(steered.sites)
    steered.backward(0)
    for p in parameters(steered):
        p.grad = None if p.grad is None else p.grad * 0.5
    reading = gradients.read()
    assert reading.accept
    assert reading.unclip.item() == pytest.approx(2, rel=1e-6)


def test_where_backward_reaches_no_probe_the_next_step_is_read_off_others():
    """As with experts: four of nine layers are probed, and none of these gets a token."""
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, target_modules=r"\d"))
    gradients = StepGradients(find_sites(model))
    routed = model.get_base_model()[5]
    for expected in (1, 4):
        model.zero_grad(set_to_none=True)
        routed(torch.ones(4)).sum().backward()
        routed.lora_B["default"].weight.grad *= 0.25
        assert gradients.read().unclip.item() == pytest.approx(expected, rel=1e-6)


def test_a_step_that_reaches_magnitudes_alone_does_not_end_the_probing():
    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    model = peft.get_peft_model(layers, peft.LoraConfig(r=2, use_dora=True, target_modules=r"\d"))
    sites = find_sites(model)
    dead, alive = sites[0], sites[1]
    dead.install(nn.Parameter(dead.A[:0].detach()), nn.Parameter(dead.B[:, :0].detach()))
    gradients = StepGradients(sites)
    for site, expected in ((dead, 1), (alive, 4), (alive, 4)):
        model.zero_grad(set_to_none=True)
        site.layer(torch.ones(4)).sum().backward()
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.25
        assert gradients.read().unclip.item() == pytest.approx(expected, rel=1e-6)


def test_a_closed_watcher_leaves_no_hook(steer, watch):
    steered = steer()
    gradients = watch(steered.sites)

    def hooked():
        return [p for s in steered.sites for p in (s.A, s.B) if p._post_accumulate_grad_hooks]

    assert hooked()
    gradients.close()
    assert not hooked()
    steered.backward(0)
    assert gradients.read().unclip == 1
    assert not hooked()


def test_a_watched_model_can_be_copied_and_pickled(steer, watch):
    steered = steer()
    watch(steered.sites)
    tokens, _ = steered.batch(0)
    file = io.BytesIO()
    torch.save(steered.model, file)
    file.seek(0)
    for twin in (copy.deepcopy(steered.model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(tokens), steered.model(tokens))
        assert not any(p._post_accumulate_grad_hooks for p in twin.parameters())


def test_a_model_of_dead_lora_sites_has_nothing_to_observe(steer, watch):
    steered = steer(ranks=dict.fromkeys(("embed", "fan", "first", "second", "conv"), 0))
    with pytest.raises(RankFlowError, match="no gradient"):
        watch(steered.sites).read()


def test_a_model_of_dead_dora_sites_is_judged_by_its_magnitudes(steer, watch):
    ranks = dict.fromkeys(("embed", "fan", "first", "second", "conv"), 0)
    steered = steer(use_dora=True, ranks=ranks)
    gradients = watch(steered.sites)
    steered.backward(0)
    reading = gradients.read()
    assert reading.accept
    assert reading.unclip == 1
