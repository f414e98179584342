from unittest.mock import patch

import pytest
import torch

from rankflow.adapters import compose, row_norms
from rankflow.bench.ledger import ledger_of
from rankflow.bench.shapes import TINY
from rankflow.bench.trainee import Adapter, Trainee, Workload, adapt, draw_states, start
from rankflow.training.fake import fake_tensors

CPU = torch.device("cpu")
RANK, TOKENS = 4, 16
WORKLOAD = Workload(TINY, 2, TOKENS, torch.float32)
SITES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (48, 32), (32, 48)]  # of a layer


def _one(compute):
    (operation,) = ledger_of(compute)
    return operation


def test_a_product_is_counted():
    a, b = torch.ones(3, 5), torch.ones(5, 7)
    operation = _one(lambda: a @ b)
    assert (operation.name, operation.flops) == ("aten.mm", 2 * 3 * 5 * 7)
    assert operation.bytes == 4 * (15 + 35 + 21)
    assert operation.is_wide


def test_a_product_in_bfloat16_is_not_wide():
    a, b = torch.ones(3, 5, dtype=torch.bfloat16), torch.ones(5, 7, dtype=torch.bfloat16)
    operation = _one(lambda: a @ b)
    assert (operation.bytes, operation.is_wide) == (2 * (15 + 35 + 21), False)


def test_what_is_added_to_is_read_and_written():
    a, b, c = torch.ones(3, 5), torch.ones(5, 7), torch.ones(3, 7)
    operation = _one(lambda: c.addmm_(a, b))
    assert (operation.flops, operation.bytes) == (2 * 3 * 5 * 7, 4 * (15 + 35 + 2 * 21))


def test_a_view_costs_nothing():
    a = torch.ones(4, 6)
    assert ledger_of(lambda: (a.T, a.view(24), a[1:], a.expand(2, 4, 6), a.detach())) == []


def test_what_is_spread_over_an_axis_is_read_once():
    a, row = torch.ones(100, 8), torch.ones(8)
    assert _one(lambda: a * row.expand(100, 8)).bytes == 4 * (800 + 8 + 800)


def test_what_is_only_like_a_tensor_is_not_read():
    a = torch.ones(1000)
    assert _one(lambda: a.new_zeros(2)).bytes == 8
    assert ledger_of(lambda: (a.new_empty(2), torch.empty_like(a), torch.empty(3))) == []


def _flops(adapter, rank=RANK):
    trainee = start(WORKLOAD, adapter, rank, CPU, 100)
    trainee.train()
    return sum(operation.flops for operation in ledger_of(trainee.train))


def test_the_flops_of_adapters_are_those_of_the_formulas():
    bare = _flops(Adapter.NONE)
    products = sum(6 * TOKENS * RANK * (out + width) for out, width in SITES)
    assert _flops(Adapter.PEFT_LORA) - bare == 2 * products
    norms = sum(2 * RANK * (out * width + out * RANK + width * RANK) for out, width in SITES)
    assert _flops(Adapter.DORA) - bare == 2 * (products + norms)


def test_the_kernels_do_the_products_of_the_torch_code():
    def count(with_kernels):
        workload = Workload(TINY, 2, TOKENS, torch.bfloat16)
        model = adapt(workload, Adapter.DORA, RANK, torch.device("meta"), 1)
        places = (compose, row_norms)
        choices = [patch.object(m, "fits", lambda *_: with_kernels) for m in places]
        with fake_tensors(model, CPU), choices[0], choices[1]:
            trainee = Trainee(model, Adapter.DORA, RANK, draw_states(workload, CPU), 1)
            return ledger_of(trainee.train)

    torch_code, kernels = count(False), count(True)
    ours = {"rankflow.mix", "rankflow.mix_gradients", "rankflow.row_norms"}
    assert {o.name for o in kernels} >= ours
    assert not {o.name for o in torch_code} & ours
    norms = {o.flops for o in kernels if o.name == "rankflow.row_norms"}
    assert norms == {2 * 2 * RANK * out * width for out, width in SITES}
    others = sum(o.flops for o in kernels if o.name != "rankflow.row_norms")
    norms = sum(2 * RANK * (out * width + out * RANK + width * RANK) for out, width in SITES)
    assert sum(o.flops for o in torch_code) - others == 2 * norms
    assert sum(o.bytes for o in kernels) < 0.9 * sum(o.bytes for o in torch_code)


@pytest.mark.parametrize("adapter", list(Adapter))
def test_all_operations_that_are_counted_move_something(adapter):
    trainee = start(WORKLOAD, adapter, RANK, CPU, 100)
    trainee.train()
    assert all(operation.bytes > 0 for operation in ledger_of(trainee.train))
