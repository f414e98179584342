import math

import numpy as np
import pytest
import torch

from rankflow.analysis import directions
from rankflow.analysis.directions import Change, magnitude_direction_change


def dense_reference(before, after):
    """Equations 3 and 4 of the paper, a row at a time in Python's floats."""
    moved, turned = [], []
    for old, new in zip(before.tolist(), after.tolist(), strict=True):
        a, b = math.sqrt(math.fsum(x * x for x in old)), math.sqrt(math.fsum(x * x for x in new))
        moved.append(abs(b - a))
        turned.append(1 - math.fsum(x * y for x, y in zip(old, new, strict=True)) / (a * b))
    return math.fsum(moved) / len(moved), math.fsum(turned) / len(turned)


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(size=(7, 5))


@pytest.mark.parametrize("size", [1e-3, 0.3, 5.0])
def test_the_changes_are_those_of_the_paper(size, weight):
    after = weight + size * np.random.default_rng(1).normal(size=weight.shape)
    change = magnitude_direction_change(weight, after)
    dM, dD = dense_reference(weight, after)
    assert change.dM == pytest.approx(dM, rel=1e-12)
    assert change.dD == pytest.approx(dD, rel=1e-8)  # the reference loses digits, not we
    assert change.norm == pytest.approx(np.linalg.norm(weight, axis=1).mean(), rel=1e-12)


def test_scaling_rows_turns_nothing(weight):
    factors = np.array([0.5, 3.0, 1.0, 1.25, 2.0, 0.1, 7.0])
    change = magnitude_direction_change(weight, factors[:, None] * weight)
    norms = np.linalg.norm(weight, axis=1)
    assert change.dM == pytest.approx((norms * abs(factors - 1)).mean(), rel=1e-12)
    assert change.dD == pytest.approx(0, abs=1e-30)


def test_an_orthogonal_map_of_the_rows_changes_no_magnitude(weight):
    rotation, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(5, 5)))
    change = magnitude_direction_change(weight, weight @ rotation)
    assert change.dM == pytest.approx(0, abs=1e-14)
    assert 0 < change.dD < 2


@pytest.mark.parametrize(("factor", "dD"), [(1, 0), (-1, 2)])
def test_a_row_turns_by_nothing_at_least_and_is_reversed_at_most(factor, dD, weight):
    assert magnitude_direction_change(weight, factor * weight).dD == pytest.approx(dD, abs=1e-14)


@pytest.mark.parametrize("angle", [1e-7, 1e-4, 1.0, 3.0])
def test_a_turn_by_a_known_angle_keeps_its_digits(angle):
    before = np.array([[2.0, 0.0], [0.0, 5.0]])
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    expected = 2 * math.sin(angle / 2) ** 2  # 1 - cos
    assert magnitude_direction_change(before, before @ turn).dD == pytest.approx(expected, rel=1e-7)


def test_rows_of_zeros_count_in_the_magnitude_alone(weight):
    before, after = weight.copy(), 2 * weight[:, ::-1]
    before[1] = 0
    after[4] = 0
    change = magnitude_direction_change(before, after)
    others = [0, 2, 3, 5, 6]
    assert change.zero_rows == 2
    assert change.dD == pytest.approx(dense_reference(before[others], after[others])[1])
    norms = [np.linalg.norm(w, axis=1) for w in (before, after)]
    assert change.dM == pytest.approx(abs(norms[1] - norms[0]).mean())


def test_zero_has_no_direction():
    zeros = np.zeros((3, 2))
    assert magnitude_direction_change(zeros, zeros + 1) == Change(
        dM=pytest.approx(math.sqrt(2)), dD=None, norm=0, zero_rows=3
    )


def test_large_weights_are_compared_in_blocks(weight, monkeypatch):
    after = weight + 0.1 * np.random.default_rng(1).normal(size=weight.shape)
    whole = magnitude_direction_change(weight, after)
    monkeypatch.setattr(directions, "_BLOCK", 11)  # two rows
    assert magnitude_direction_change(weight, after) == whole


def test_low_precision_is_compared_as_it_is_stored(weight):
    before = torch.tensor(weight, dtype=torch.bfloat16).float().numpy()
    after = before * np.float32(1.5)
    change = magnitude_direction_change(before, after)
    assert change.dM == pytest.approx(np.linalg.norm(before.astype(float), axis=1).mean() / 2)
    assert change.dD < 1e-14


@pytest.mark.parametrize(("size", "is_nothing"), [(0, True), (1e-8, True), (1e-4, False)])
def test_only_what_is_above_rounding_is_a_change(size, is_nothing, weight):
    after = (weight * (1 + size)).astype(np.float32)
    change = magnitude_direction_change(weight.astype(np.float32), after).beyond_rounding()
    assert change.is_nothing is is_nothing
    assert change.dD == 0


def test_a_turn_above_rounding_is_kept_and_no_direction_stays_none(weight):
    turned = magnitude_direction_change(weight, weight + 1e-4 * weight[:, ::-1])
    assert turned.beyond_rounding() == turned
    assert Change(dM=1e-9, dD=None, norm=1.0).beyond_rounding() == Change(0.0, None, 1.0)


@pytest.mark.parametrize(
    ("other", "is_close"),
    [((1.0, 0.5), True), ((1.0009, 0.4996), True), ((1.002, 0.5), False), ((1.0, 0.502), False)],
)
def test_changes_within_a_thousandth_are_close(other, is_close):
    assert Change(1.0, 0.5, norm=1.0).is_close_to(Change(*other, norm=1.0)) is is_close


@pytest.mark.parametrize("shape", [(5, 7), (7,), (7, 5, 1)])
def test_other_shapes_are_refused(shape, weight):
    with pytest.raises(ValueError, match="two matrices of one shape"):
        magnitude_direction_change(weight, np.ones(shape))
