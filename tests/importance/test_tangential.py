import pytest
import torch

from rankflow.importance.norms import Norm
from rankflow.importance.tangential import Tangential


def test_it_is_the_energy_that_turns_the_rows_of_the_effective_weight(steer):
    steered = steer(use_dora=True)
    for site in steered.sites:  # as if trained, so that m is not n
        site.magnitude.data *= 1 + torch.rand(site.magnitude.shape)
    expected = []
    for site, a, b, _, _ in steered.components():
        factors, directions = steered.factors(site)
        energy = 0.0
        for factor, row, entry in zip(factors, directions, b, strict=True):
            update = factor * site.scale * entry * a
            unit = row / row.norm()
            energy += (update - (update @ unit) * unit).square().sum().item()
        expected.append(energy)
    torch.testing.assert_close(
        Tangential(steered.sites).read().tolist(), expected, rtol=1e-9, atol=0
    )


def test_without_a_magnitude_it_is_the_whole_energy_of_the_component(steer):
    steered = steer()
    energies = Tangential(steered.sites).read()
    torch.testing.assert_close(
        energies, Norm(steered.sites).read().double() ** 2, rtol=1e-5, atol=0
    )


def test_a_component_along_the_rows_is_worth_nothing(steer):
    steered = steer(use_dora=True)
    site = steered.sites[3]  # "second", of rank 1
    weight = site.layer.get_base_layer().weight
    direction = weight[0].detach() / weight[0].norm()
    site.A.data = direction.unsqueeze(0).clone()
    site.B.data = torch.zeros_like(site.B)
    site.B.data[0] = 0.5  # touches the row that it lies along, and no other
    index = 5  # behind 2 of "embed" and 3 of "first"
    assert Tangential(steered.sites).read()[index].item() == pytest.approx(0, abs=1e-15)
    assert Norm(steered.sites).read()[index] > 0.1


@pytest.mark.parametrize("score", [Norm, Tangential])
def test_a_row_of_zeros_with_a_magnitude_leaves_the_scores_finite(score, steer):
    steered = steer(use_dora=True)
    site = steered.sites[3]
    site.layer.get_base_layer().weight.data[1] = 0
    site.B.data[1] = 0
    site.magnitude.data[1] = 30
    assert torch.isfinite(score(steered.sites).read()).all()
