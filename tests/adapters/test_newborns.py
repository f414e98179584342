import math

import pytest
import torch

from rankflow.adapters.newborns import along, kaiming, orthogonal, orthogonal_rows


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def propose(*rows):
    """Proposes these rows whatever is asked, as many as wanted at most."""
    given = torch.tensor(rows, dtype=torch.float64)
    return lambda index, count, live: given[:count]


@pytest.mark.parametrize("live", ["none", "independent", "repeated", "zero", "huge"])
def test_orthogonal_rows_leave_the_space_of_the_live_ones(live):
    rows = {
        "none": torch.zeros(0, 8),
        "independent": torch.randn(3, 8),
        "repeated": torch.randn(1, 8).expand(3, 8),
        "zero": torch.zeros(3, 8),
        "huge": 1e8 * torch.randn(3, 8),
    }[live].double()
    born = orthogonal_rows(rows, 8 - len(rows), generator())
    torch.testing.assert_close(born @ born.T, torch.eye(len(born)).double())
    scale = rows.norm(dim=1).max() if len(rows) and rows.any() else 1
    assert len(rows) == 0 or (rows @ born.T).abs().max() < 1e-13 * scale


def test_orthogonal_rows_do_not_depend_on_the_type_of_the_weights():
    live = torch.randn(2, 6).bfloat16()
    assert torch.equal(
        orthogonal_rows(live, 2, generator()), orthogonal_rows(live.double(), 2, generator())
    )


STRATEGIES = {
    "orthogonal": orthogonal,
    "kaiming": lambda g: kaiming(["linear"], g),
    "along": lambda g: along(propose([0.0] * 7 + [1.0]), g),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_equal_seeds_give_equal_rows_and_others_do_not(name):
    live = torch.randn(2, 8)
    first, same, other = (STRATEGIES[name](generator(seed)).rows(0, live, 3) for seed in (0, 0, 1))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert (first.shape, first.dtype, first.device.type) == ((3, 8), torch.float64, "cpu")


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding"])
def test_kaiming_draws_what_peft_would(kind):
    rows = kaiming(["linear", kind], generator()).rows(1, torch.zeros(0, 400), 300)
    # 120,000 numbers: three standard errors of their mean square are 0.8% at most.
    assert rows.square().sum(dim=1).mean().item() == pytest.approx(1, rel=0.01)
    largest = math.sqrt(400) * rows.abs().max().item()
    if kind == "embedding":  # 120,000 normal numbers reach 4
        assert largest > 4
    else:  # PEFT's 1 / sqrt(in) over the length 1 / sqrt(3)
        assert largest == pytest.approx(math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("births", [1, 2, 4])
def test_newborns_take_the_proposed_directions_and_then_orthogonal_ones(births):
    live = torch.zeros(1, 6)
    live[0, 0] = 5.0
    proposed = torch.eye(6).double()[2:4]
    rows = along(propose(*proposed.tolist()), generator()).rows(0, live, births)
    assert torch.equal(rows[:2], proposed[:births])
    torch.testing.assert_close(rows @ rows.T, torch.eye(births).double())
    assert rows[:, 0].abs().max() < 1e-12


def test_directions_are_asked_for_the_site_the_births_and_the_live_rows():
    asked = []

    def directions(index, count, live):
        asked.append((index, count, live))
        return torch.zeros(0, 6, dtype=torch.float64)

    live = torch.randn(2, 6)
    rows = along(directions, generator(3)).rows(7, live, 3)
    assert [a[:2] for a in asked] == [(7, 3)]
    assert asked[0][2] is live
    assert torch.equal(rows, orthogonal(generator(3)).rows(0, live, 3))
