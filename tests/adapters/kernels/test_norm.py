"""The kernel of the norms against the dense sum in float64."""

import pytest
import torch

from rankflow.adapters.row_norms import row_norms_of_sum

TINY = torch.finfo(torch.float32).tiny
EXACT = 2e-6  # some roundings of 2^-22, of which float32 is made on tensor cores
SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def row_norms(device):
    from rankflow.adapters.kernels.norm import row_norms as kernel

    def run(weight, A, B, scale, axis=0, cancelled=1e-2):
        return kernel(weight, A, B, scale, axis, cancelled)

    return run


def dense(W, A, B, scale):
    return (W.double() + scale * (B.double() @ A.double())).square().sum(1).sqrt()


def worst(norms, W, A, B, scale):
    return (norms.double() / dense(W, A, B, scale) - 1).abs().max().item()


@pytest.mark.parametrize("rank", [0, 1, 3, 8, 33, 384])
@pytest.mark.parametrize("adapter", [SINGLE, BRAIN, HALF])
@pytest.mark.parametrize("weight", [SINGLE, BRAIN, HALF])
def test_norms_are_those_of_the_dense_sum_for_every_rank(weight, adapter, rank, random, row_norms):
    W, A, B = random(70, 133, dtype=weight), random(rank, 133), random(70, rank)
    A, B = (0.3 * A).to(adapter), (0.3 * B).to(adapter)
    norms = row_norms(W, A, B, 0.7)
    assert norms.dtype == SINGLE
    assert worst(norms, W, A, B, 0.7) <= EXACT


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (200, 3), (65, 64), (5, 2100)])
def test_norms_are_those_of_the_dense_sum_for_every_shape(shape, axis, random, row_norms):
    W, A, B = random(*shape), 0.3 * random(5, shape[1]), 0.3 * random(shape[0], 5)
    stored = W if axis == 0 else W.T.contiguous()
    assert worst(row_norms(stored, A, B, -0.7, axis), W, A, B, -0.7) <= EXACT


@pytest.mark.parametrize("axis", [0, 1])
def test_weight_and_factors_need_not_be_contiguous(axis, random, row_norms):
    W, A, B = random(140, 200)[1::2, ::3], random(67, 4).T, random(4, 70).T
    stored = W if axis == 0 else W.T
    assert worst(row_norms(stored, A, B, 0.7, axis), W, A, B, 0.7) <= EXACT


@pytest.mark.parametrize("rank", [1, 8, 40])
@pytest.mark.parametrize("noise", [0.3, 0.1, 3e-2, 1e-2, 1e-3])  # the square is down to 1e-6
def test_norms_stay_exact_however_much_cancels(noise, rank, random, row_norms):
    A, B = random(rank, 300), random(90, rank)
    update = 2.0 * (B @ A)
    W = -update + noise * update.square().mean().sqrt() * random(90, 300)
    W[::3] = random(30, 300)  # beside rows that do not cancel
    own = worst(torch.linalg.norm(W + update, dim=1), W, A, B, 2.0)
    assert worst(row_norms(W, A, B, 2.0), W, A, B, 2.0) <= max(3e-5, 4 * own)


def test_rows_that_cancel_would_not_be_exact_by_their_terms(random, row_norms):
    A, B = random(8, 300), random(90, 8)
    W = -2.0 * (B @ A) + 1e-2 * random(90, 300)
    by_terms = worst(row_norms(W, A, B, 2.0, cancelled=0.0), W, A, B, 2.0)
    assert by_terms > 100 * worst(row_norms(W, A, B, 2.0), W, A, B, 2.0)


@pytest.mark.parametrize("adapter", [SINGLE, BRAIN])
@pytest.mark.parametrize("share", [0.4, 0.9, 1.0])
def test_norms_of_bf16_weights_are_exact_far_below_bf16s_rounding(
    share, adapter, random, row_norms
):
    A, B = random(8, 300, dtype=adapter), random(90, 8, dtype=adapter)
    W = (-share * 2.0 * (B.float() @ A.float()) + 0.1 * random(90, 300)).bfloat16()
    assert worst(row_norms(W, A, B, 2.0), W, A, B, 2.0) <= 1e-4


def test_small_factors_next_to_a_float16_weight_keep_their_digits(random, row_norms):
    W, A, B = random(70, 133, dtype=HALF), 1e-7 * random(8, 133), 1e7 * random(70, 8)
    assert worst(row_norms(W, A, B, 1.0), W, A, B, 1.0) <= EXACT


def test_norms_of_float16_weights_do_not_overflow(random, row_norms):
    W = torch.full_like(random(3, 40, dtype=HALF), 300.0)
    norms = row_norms(W, random(1, 40, dtype=HALF), 0 * random(3, 1, dtype=HALF), 1.0)
    assert norms.tolist() == pytest.approx([300 * 40**0.5] * 3)


def test_a_row_without_length_has_the_least_norm_and_a_broken_one_shows(random, row_norms):
    W, A, B = random(70, 50), random(2, 50), random(70, 2)
    W[3], B[3] = 0, 0
    W[66] = -(B[66] @ A)
    W[5, 7] = torch.nan
    norms = row_norms(W, A, B, 1.0)
    assert norms[3].item() == TINY
    assert TINY <= norms[66].item() < 1e-5
    assert torch.isnan(norms).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_a_weight_without_rows_or_columns_has_the_norms_of_zeros(shape, random, row_norms):
    norms = row_norms(random(*shape), random(3, shape[1]), random(shape[0], 3), 1.0)
    assert norms.tolist() == [TINY] * shape[0]


def test_the_same_norms_come_out_each_time(random, row_norms):
    W, A, B = random(70, 700, dtype=BRAIN), random(20, 700), random(70, 20)
    W[::50] = (-B @ A)[::50].bfloat16()
    assert torch.equal(row_norms(W, A, B, 1.0), row_norms(W, A, B, 1.0))


@pytest.mark.parametrize("axis", [0, 1])
def test_the_operator_keeps_torchs_rules(axis, random, row_norms):
    W, A, B = random(6, 5), random(3, 5), random(6, 3)
    operator = torch.ops.rankflow.row_norms.default
    torch.library.opcheck(operator, (W if axis == 0 else W.T, A, B, 0.5, axis, 1e-2))


@pytest.mark.parametrize("dtype", [SINGLE, torch.float64])
def test_the_kernel_is_used_for_what_it_can_read(dtype, random, kernels_in):
    W, A, B = (random(*shape, dtype=dtype) for shape in ((6, 5), (3, 5), (6, 3)))
    used = kernels_in(lambda: row_norms_of_sum(W, A, B, 0.5))
    assert used == ({"row_norms"} if dtype == SINGLE else set())


@pytest.mark.parametrize("axis", [0, 1])
def test_the_kernel_gives_the_norms_of_torchs_code(axis, random, monkeypatch):
    W, A, B = random(40, 60), random(3, 60), random(40, 3)
    stored = W if axis == 0 else W.T
    mine = row_norms_of_sum(stored, A, B, 0.5, axis=axis)
    monkeypatch.setenv("RANKFLOW_TRITON", "0")
    torch.testing.assert_close(
        mine, row_norms_of_sum(stored, A, B, 0.5, axis=axis), rtol=EXACT, atol=0
    )
