import itertools

import numpy as np
import pytest
import torch

from rankflow.export.decompose import (
    AdaptedMatrix,
    decompose,
    factored_svd,
    magnitude_after,
    squared_error,
)

SCALE = 0.7


def draw(out=6, rank=4, width=8, dtype=torch.float64):
    A, B = torch.randn(rank, width, dtype=dtype), torch.randn(out, rank, dtype=dtype)
    return A, B, torch.randn(out, width, dtype=dtype), 0.5 + torch.rand(out, dtype=dtype)


def normalised(magnitude, V):
    return (magnitude / V.norm(dim=1)).unsqueeze(1) * V


def choices(count):
    for size in range(count + 1):
        for keep in itertools.combinations(range(count), size):
            yield np.array(keep, dtype=np.int64)


@pytest.mark.parametrize(("out", "rank", "width"), [(7, 3, 5), (4, 4, 9), (3, 5, 8), (6, 4, 2)])
def test_the_factored_svd_is_the_dense_one(out, rank, width):
    B, A = torch.randn(out, rank), torch.randn(rank, width)
    U, S, V = factored_svd(B, A)
    dense = B.double() @ A.double()
    expected = torch.linalg.svdvals(dense)
    assert len(S) == min(out, rank, width)
    torch.testing.assert_close(S, expected[: len(S)])
    torch.testing.assert_close(U * S @ V.T, dense)
    eye = torch.eye(len(S), dtype=torch.float64)
    torch.testing.assert_close(U.T @ U, eye)
    torch.testing.assert_close(V.T @ V, eye)


def test_all_components_of_lora_give_the_update_and_the_greatest_are_eckart_and_youngs():
    A, B, _, _ = draw()
    part = decompose(AdaptedMatrix("site", A, B, SCALE, None), None)
    torch.testing.assert_close(part.B @ part.A, B @ A)
    U, S, Vh = torch.linalg.svd(SCALE * B @ A, full_matrices=False)
    assert part.change == pytest.approx(float(S.square().sum()))
    for rank in range(5):
        keep = np.arange(rank)
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        torch.testing.assert_close(SCALE * part.B[:, keep] @ part.A[keep], best)
        assert squared_error(part, keep) == pytest.approx(float(S[rank:4].square().sum()))


def test_the_error_of_lora_is_exact_for_any_choice():
    A, B, _, _ = draw()
    part = decompose(AdaptedMatrix("site", A, B, SCALE, None), None)
    for keep in choices(4):
        missing = SCALE * (B @ A - part.B[:, keep] @ part.A[keep])
        assert squared_error(part, keep) == pytest.approx(float(missing.square().sum()), abs=1e-12)


def test_the_error_of_dora_is_exact_for_any_choice_and_its_magnitude_the_best():
    A, B, W, m = draw()
    part = decompose(AdaptedMatrix("site", A, B, SCALE, m), W)
    V = W + SCALE * B @ A
    before = normalised(m, V)
    assert part.change == pytest.approx(float((before - W).square().sum()))
    for keep in choices(4):
        kept = W + SCALE * part.B[:, keep] @ part.A[keep]
        # The nearest multiple of each row, by least squares and independent of any formula of ours.
        best = torch.linalg.lstsq(kept.unsqueeze(2), before.unsqueeze(2)).solution.flatten()
        magnitude = magnitude_after(part, keep)
        torch.testing.assert_close(magnitude, best * kept.norm(dim=1))
        missing = float((normalised(magnitude, kept) - before).square().sum())
        assert squared_error(part, keep) == pytest.approx(missing, abs=1e-12)
        dropped = part.energies[np.setdiff1d(np.arange(4), keep)].sum()
        assert missing <= dropped + 1e-12  # the energies bound it from above
        keeping_m = float((normalised(m, kept) - before).square().sum())
        assert missing <= keeping_m + 1e-12


def test_at_the_scale_that_it_has_no_other_update_of_its_rank_is_nearer_to_dora():
    A, B, W, m = draw()
    part = decompose(AdaptedMatrix("site", A, B, SCALE, m), W)
    c = (m / (W + SCALE * B @ A).norm(dim=1)).unsqueeze(1)
    U, S, Vh = torch.linalg.svd(c * SCALE * (B @ A), full_matrices=False)
    for rank in range(1, 5):
        best = U[:, :rank] * S[:rank] @ Vh[:rank]
        ours = c * SCALE * (part.B[:, :rank] @ part.A[:rank])
        torch.testing.assert_close(ours, best)
    plain = decompose(AdaptedMatrix("site", A, B, SCALE, None), None)
    unweighted = c * SCALE * (B @ A - plain.B[:, :2] @ plain.A[:2])
    assert part.energies[2:].sum() < float(unweighted.square().sum())


def test_the_choice_for_dora_is_near_what_alternating_least_squares_reaches():
    A, B, W, m = draw(out=12, rank=4, width=16)
    W = 4 * W  # an update that is small beside its weight, as in training
    before = normalised(m * 4, W + SCALE * B @ A)
    part = decompose(AdaptedMatrix("site", A, B, SCALE, m * 4), W)
    t = (m * 4 / (W + SCALE * B @ A).norm(dim=1)).unsqueeze(1)
    for _ in range(200):  # exact minimisation over the update, then over the rows' scales
        U, S, Vh = torch.linalg.svd(before - t * W, full_matrices=False)
        update = U[:, :2] * S[:2] @ Vh[:2]
        kept = W + update / t
        t = ((kept * before).sum(dim=1) / kept.square().sum(dim=1)).unsqueeze(1)
    least = float((t * kept - before).square().sum())
    assert least <= squared_error(part, np.arange(2)) + 1e-12
    assert squared_error(part, np.arange(2)) < 1.1 * least


@pytest.mark.parametrize("shape", [(6, 8), (8, 6)])
@pytest.mark.parametrize("scale", [SCALE, -SCALE])
@pytest.mark.parametrize("most", [4, 6])
def test_a_folded_dora_is_the_best_lora_of_every_rank_up_to_its_cap(shape, scale, most):
    A, B, W, m = draw(out=shape[0], width=shape[1])
    part = decompose(AdaptedMatrix("site", A, B, scale, m), W, most=most)
    change = normalised(m, W + scale * B @ A) - W
    S = torch.linalg.svdvals(change)
    assert len(part.energies) == most
    assert part.change == pytest.approx(float(change.square().sum()))
    torch.testing.assert_close(part.A.norm(dim=1), part.B.norm(dim=0))
    for rank in range(most + 1):
        keep = np.arange(rank)
        missing = float((change - scale * part.B[:, keep] @ part.A[keep]).square().sum())
        assert missing == pytest.approx(float(S[rank:].square().sum()), abs=1e-12)
        assert squared_error(part, keep) == pytest.approx(missing, abs=1e-12)
        assert magnitude_after(part, keep) is None


def test_folded_components_account_for_themselves_however_small_they_are():
    A, B, W, _ = draw(out=12, rank=1, width=9)
    U, _, Vh = torch.linalg.svd(W, full_matrices=False)
    W = U * torch.logspace(0, -11, 9, dtype=torch.float64) @ Vh
    part = decompose(AdaptedMatrix("site", A, 0 * B, SCALE, 2 * W.norm(dim=1)), W, most=9)
    assert len(part.energies) == 9  # the change is W itself
    for rank in range(9):
        missing = W - SCALE * part.B[:, :rank] @ part.A[:rank]
        expected = float(missing.square().sum())
        assert squared_error(part, np.arange(rank)) == pytest.approx(expected, rel=1e-3)


def test_folded_components_are_kept_in_the_type_of_the_adapter():
    A, B, W, m = draw(dtype=torch.float32)
    part = decompose(AdaptedMatrix("site", A.bfloat16(), B, SCALE, m), W, most=4)
    assert part.A.dtype == part.B.dtype == torch.float32


def test_components_of_zero_are_no_components():
    A, B, W, m = draw()
    B[:, 1] = 0
    A[3] = A[0]
    assert len(decompose(AdaptedMatrix("site", A, B, SCALE, None), None).energies) == 2
    assert len(decompose(AdaptedMatrix("site", A, B, SCALE, m), W).energies) == 2


@pytest.mark.parametrize("scale", [0.0, SCALE])
def test_a_site_without_components_only_has_its_magnitude(scale):
    A, B, W, m = draw(rank=0 if scale else 4)
    part = decompose(AdaptedMatrix("site", A, B, scale, m), W)
    assert part.energies.size == 0
    assert part.change == pytest.approx(float((normalised(m, W) - W).square().sum()))
    nothing = np.zeros(0, dtype=np.int64)
    torch.testing.assert_close(magnitude_after(part, nothing), m)
    assert squared_error(part, nothing) == 0
    assert decompose(AdaptedMatrix("site", A, B, scale, m), W, most=len(A)).energies.size == 0


def test_rows_of_zero_magnitude_and_of_zero_weight_are_no_trouble():
    A, B, W, m = draw()
    m[0] = 0
    W[1], B[1], m[1] = 0, 0, 0
    part = decompose(AdaptedMatrix("site", A, B, SCALE, m), W)
    keep = np.arange(2)
    magnitude = magnitude_after(part, keep)
    assert torch.isfinite(part.B).all()
    assert torch.isfinite(magnitude).all()
    assert magnitude[:2].tolist() == [0, 0]
    kept = W + SCALE * part.B[:, keep] @ part.A[keep]
    before = normalised(m[2:], (W + SCALE * B @ A)[2:])
    missing = float((normalised(magnitude[2:], kept[2:]) - before).square().sum())
    assert squared_error(part, keep) == pytest.approx(missing)
