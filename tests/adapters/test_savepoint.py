import pytest
import torch
from torch import nn

from rankflow.adapters.savepoint import Savepoint, renew, undone_on_error
from rankflow.adapters.sites import find_sites
from rankflow.errors import BudgetError, SurgeryError


class Owner:
    def __init__(self):
        self.number = 1
        self.table = {"a": 1, "b": 2}
        self.row = [1, 2]
        self.names = {"x"}


def test_attributes_and_the_content_of_containers_come_back_in_order():
    owner = Owner()
    table, row = owner.table, owner.row
    before = Savepoint((), others=[owner])
    owner.number, owner.new = 2, 3
    del owner.table["a"]
    owner.table["a"] = 1
    owner.row.append(3)
    owner.row = []
    owner.names.clear()
    before.restore()
    assert vars(owner) == vars(Owner())
    assert list(owner.table) == ["a", "b"]
    assert owner.table is table
    assert owner.row is row


def test_a_removed_hook_is_back_and_its_handle_removes_it_again(mixed):
    sites = find_sites(mixed())
    calls = []
    site = sites[2]
    handles = [
        site.layer.register_forward_hook(lambda *_: calls.append("forward")),
        site.B.register_post_accumulate_grad_hook(lambda *_: calls.append("backward")),
    ]
    before = Savepoint(sites)
    for handle in handles:
        handle.remove()
    leaked = site.A.register_post_accumulate_grad_hook(lambda *_: calls.append("leaked"))
    before.restore()
    site.layer(torch.ones(1, 5)).sum().backward()
    assert calls == ["forward", "backward"]
    for handle in (*handles, leaked):
        handle.remove()
    site.layer(torch.ones(1, 5)).sum().backward()
    assert calls == ["forward", "backward"]


def test_parameters_come_back_with_their_memory_and_gradients(mixed):
    sites = find_sites(mixed(use_dora=True))
    site = sites[2]
    A, values, gradient = site.A, site.A.detach().clone(), torch.ones_like(site.A)
    A.grad = gradient
    address = A.data_ptr()
    before = Savepoint(sites)
    A.grad = None
    A.data = A.data[:1] * 2
    A.requires_grad_(False)
    site.install(nn.Parameter(A.detach().clone()), nn.Parameter(site.B.detach()[:, :1]))
    before.restore()
    assert site.A is A
    assert A.requires_grad
    assert A.data_ptr() == address
    assert torch.equal(A, values)
    assert A.grad is gradient
    assert (site.layer.r["default"], site.layer.lora_A["default"].out_features) == (3, 3)


def test_an_optimizers_groups_and_state_come_back(mixed):
    model = mixed()
    sites = find_sites(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.randint(11, (4, 4))).sum().backward()
    optimizer.step()
    params = list(optimizer.param_groups[0]["params"])
    state = {id(p): s for p, s in optimizer.state.items()}
    before = Savepoint(sites, optimizer=optimizer)
    optimizer.param_groups[0]["params"][0] = nn.Parameter(torch.ones(1))
    del optimizer.state[params[1]]
    before.restore()
    assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True))
    assert {id(p): s for p, s in optimizer.state.items()} == state


def test_renewed_values_leave_what_was_there_before():
    parameter = nn.Parameter(torch.ones(2, 3))
    held = parameter.data
    renew(parameter, torch.tensor(2.0, dtype=torch.float64))
    assert parameter.tolist() == [[2.0] * 3] * 2
    assert parameter.dtype == torch.float32
    assert held.tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    ("raised", "seen"),
    [
        (RuntimeError("no room"), SurgeryError),
        (MemoryError(), SurgeryError),
        (BudgetError("too small"), BudgetError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_errors_of_the_machine_are_told_and_others_pass(raised, seen):
    owner = Owner()

    def move():
        with undone_on_error("the move", (), others=[owner]):
            owner.number = 2
            raise raised

    with pytest.raises(seen) as caught:
        move()
    assert owner.number == 1
    if seen is SurgeryError:
        assert caught.value.__cause__ is raised
        assert "the move failed, and everything is as it was before it: " in str(caught.value)
    else:
        assert caught.value is raised
