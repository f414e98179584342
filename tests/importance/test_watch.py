import copy
import gc
import pickle
import weakref

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rankflow.adapters.sites import find_sites
from rankflow.importance.watch import watch


class Seen(list):
    """Collects what is shown, as copies."""

    def __call__(self, x, delta):
        self.append((x.clone(), delta.clone()))

    @property
    def gradient(self):
        """The weight's gradient, of a linear layer."""
        return sum(d.reshape(-1, d.shape[-1]).T @ x.reshape(-1, x.shape[-1]) for x, d in self)


class Chain(nn.Module):
    """Two layers; the first may be checkpointed, and what lies between them may be in place."""

    def __init__(self, between=torch.tanh, reentrant=None):
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 4)
        self.between, self.reentrant = between, reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.second(self._begin(x))
        return self.second(checkpoint(self._begin, x, use_reentrant=self.reentrant))

    def _begin(self, x):
        return self.between(self.first(x))


def make_chain(ranks=(2, 2), **options):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=2, target_modules=["first", "second"])
    model = peft.get_peft_model(Chain(**options), config).double()
    sites = find_sites(model)
    for site, rank in zip(sites, ranks, strict=True):
        A, B = torch.randn(rank, site.in_features), torch.randn(site.out_features, rank)
        site.install(nn.Parameter(A.double()), nn.Parameter(B.double()))
    return model, sites


def dense_gradients(model, sites, x):
    """The gradients of the base weights, by plain autograd."""
    weights = [site.layer.get_base_layer().weight for site in sites]
    for weight in weights:
        weight.requires_grad_()
    gradients = torch.autograd.grad(model(x).square().sum(), weights)
    for weight in weights:
        weight.requires_grad_(False)
    return gradients


def x_of(rows=7):
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(5)).double()


@pytest.mark.parametrize("ranks", [(2, 2), (0, 2), (2, 0), (0, 0)], ids=str)
def test_input_and_gradient_are_shown_even_where_all_before_is_frozen(ranks):
    model, sites = make_chain(ranks)
    expected = dense_gradients(model, sites, x_of())
    seen = [Seen() for _ in sites]
    for site, note in zip(sites, seen, strict=True):
        watch(site, note)
    model(x_of()).square().sum().backward()
    for note, gradient in zip(seen, expected, strict=True):
        torch.testing.assert_close(note.gradient, gradient)


@pytest.mark.parametrize("ranks", [(2, 2), (0, 2)], ids=str)
def test_outputs_and_gradients_stay_what_they_were(ranks):
    results = []
    for watched in (False, True):
        model, sites = make_chain(ranks)
        if watched:
            for site in sites:
                watch(site, lambda x, delta: None)
        x = x_of().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True) if a is not None)


@pytest.mark.parametrize("ranks", [(2, 2), (0, 2)], ids=str)
@pytest.mark.parametrize(
    "between", [torch.relu_, torch.tanh_, lambda y: y.add_(1.0), lambda y: y.mul_(2)]
)
def test_the_output_may_be_modified_in_place(between, ranks):
    model, sites = make_chain(ranks, between=between)
    expected = dense_gradients(model, sites, x_of())[0]
    note = Seen()
    watch(sites[0], note)
    model(x_of()).square().sum().backward()
    torch.testing.assert_close(note.gradient, expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_shown_once(reentrant):
    model, sites = make_chain(reentrant=reentrant)
    x = x_of().requires_grad_()
    expected = dense_gradients(*make_chain(), x_of())
    seen = [Seen() for _ in sites]
    for site, note in zip(sites, seen, strict=True):
        watch(site, note)
    model(x).square().sum().backward()
    for note, gradient in zip(seen, expected, strict=True):
        assert len(note) == 1
        torch.testing.assert_close(note.gradient, gradient)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_watching_holds_no_input_that_checkpointing_gives_up(checkpointed):
    model, sites = make_chain()
    inputs = []
    sites[1].layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    watch(sites[1], lambda x, delta: None)
    x = x_of().requires_grad_()
    y = checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)
    gc.collect()
    assert (inputs[0]() is None) is checkpointed
    y.sum().backward()


def test_the_input_is_the_very_tensor_and_not_a_copy():
    _, sites = make_chain()
    addresses = []
    watch(sites[0], lambda x, delta: addresses.append(x.data_ptr()))
    x = x_of()
    sites[0].layer(x).sum().backward()
    assert addresses == [x.data_ptr()]


def test_every_call_and_every_microbatch_is_shown():
    _, sites = make_chain()
    layer = sites[0].layer
    note = Seen()
    watch(sites[0], note)
    a, b = x_of(3), x_of(5)
    (layer(a).sum() + 2 * layer(b).sum()).backward()
    layer(a).sum().backward()
    torch.testing.assert_close(note.gradient, torch.ones(5, 1) * (2 * a.sum(0) + 2 * b.sum(0)))


def test_an_input_passed_by_name_is_found():
    _, sites = make_chain()
    note = Seen()
    watch(sites[0], note)
    sites[0].layer(x=x_of()).sum().backward()
    assert len(note) == 1


def test_under_autocast_the_gradient_of_the_output_is_shown_in_its_type():
    model, sites = make_chain()
    model.float()
    note = Seen()
    watch(sites[0], note)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(x_of().float()).square().sum()
    loss.backward()
    ((x, delta),) = note
    assert (x.dtype, delta.dtype) == (torch.float32, torch.bfloat16)


def test_passes_in_which_the_adapter_has_no_part_are_not_shown():
    model, sites = make_chain()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["first"]))
    note = Seen()
    watch(sites[0], note)
    x = x_of().requires_grad_()
    with torch.no_grad():
        model(x)
    with model.disable_adapter():
        model(x).sum().backward()
    model.set_adapter("other")
    model(x).sum().backward()
    model.set_adapter("default")
    model.merge_adapter()
    model(x).sum().backward()
    model.unmerge_adapter()
    assert note == []
    model(x).sum().backward()
    assert len(note) == 1


def test_a_removed_watch_leaves_nothing_behind():
    model, sites = make_chain()
    note = Seen()
    handle = watch(sites[0], note)
    assert sites[0].layer._forward_hooks
    handle.remove()
    assert not sites[0].layer._forward_hooks
    model(x_of()).sum().backward()
    assert note == []


def test_gradients_of_gradients_pass_through():
    results = []
    for watched in (False, True):
        model, sites = make_chain()
        if watched:
            watch(sites[0], lambda x, delta: None)
        x = x_of().requires_grad_()
        (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
        results.append(sites[0].A.grad)
    assert torch.equal(*results)


def test_a_watched_model_can_be_copied_and_pickled():
    model, sites = make_chain()
    watch(sites[0], print)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x_of()), model(x_of()))
