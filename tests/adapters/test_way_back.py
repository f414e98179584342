import pytest
import torch
from torch import nn

from rankflow.adapters.rebuild import take
from rankflow.adapters.savepoint import Savepoint
from rankflow.adapters.sites import find_sites
from rankflow.adapters.way_back import WayBack, after_cut, whole

SHAPES = [((6, 5), 0), ((5, 6), 1), ((6, 2, 3, 2), 0), ((4, 6, 1, 1), 1), ((6,), 0)]
CUTS = [[], [4], [0, 2, 5], [0, 1, 2, 3, 4, 5]]


def indices(kept):
    return torch.tensor(kept), torch.tensor([i for i in range(6) if i not in kept])


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
@pytest.mark.parametrize("kept", CUTS)
@pytest.mark.parametrize("births", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_was_cut_and_grown_comes_back_bit_for_bit(shape, axis, kept, births, dtype):
    old = torch.randn(shape).to(dtype)
    values = old.clone()
    kept, removed = (index.long() for index in indices(kept))
    successor = take(old, axis, kept, births)
    assert torch.equal(successor.narrow(axis, 0, len(kept)), values.index_select(axis, kept))
    assert not successor.narrow(axis, len(kept), births).any()
    way_back = after_cut(old, successor, axis, kept, removed)
    successor.narrow(axis, len(kept), births).fill_(7)  # newborns may change, survivors may not
    old.data = old.new_empty(0)
    back = way_back.rebuild()
    assert back.dtype == dtype
    assert torch.equal(back, values)
    assert way_back.rest.numel() == values.index_select(axis, removed).numel()


def test_the_order_in_memory_comes_back_too():
    old = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    values, stride = old.clone(), old.stride()
    back = whole(old).rebuild()
    assert back.stride() == stride
    assert torch.equal(back, values)


def test_what_was_made_is_freed_and_what_was_let_go_comes_back_in_the_same_objects():
    old, new = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.zeros(1, 2))
    old.grad = torch.ones(3, 2)
    values = old.detach().clone()
    before = Savepoint(())
    before.made(new)
    before.let_go(old, whole(old))
    assert (old.numel(), old.grad) == (0, None)
    before.restore()
    assert torch.equal(old, values)
    assert old.requires_grad
    assert new.untyped_storage().nbytes() == 0


def test_a_parameter_of_a_site_gets_its_gradient_back(mixed):
    sites = find_sites(mixed())
    A = sites[2].A
    A.grad, values = torch.ones_like(A), A.detach().clone()
    gradient = A.grad
    before = Savepoint(sites)
    before.let_go(A, whole(A))
    before.restore()
    assert torch.equal(A, values)
    assert A.grad is gradient


def test_a_way_back_that_is_interrupted_can_be_gone_on_with(monkeypatch):
    tensors = [torch.randn(4) for _ in range(3)]
    values = [t.clone() for t in tensors]
    before = Savepoint(())
    for tensor in tensors:
        before.let_go(tensor, whole(tensor))
    rebuild, calls = WayBack.rebuild, []

    def fail_once(way_back):
        calls.append(way_back)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return rebuild(way_back)

    monkeypatch.setattr(WayBack, "rebuild", fail_once)
    with pytest.raises(KeyboardInterrupt):
        before.restore()
    before.restore()
    assert all(torch.equal(t, v) for t, v in zip(tensors, values, strict=True))
    assert len(calls) == 4
