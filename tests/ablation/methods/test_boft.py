import pytest
import torch

from rankflow.ablation.methods.boft import BoftMethod, _BlockDiagonal, butterfly
from rankflow.ablation.methods.method import UnsupportedError

METHOD = BoftMethod()


def build(case, size):
    model = METHOD.build(case.base(torch.float64), case.setting(), size).model.double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(0.3 * noise)
    return model.get_submodule("base_model.model.model.layers.0.mlp.gate_proj")  # 16 inputs


def rotation_of(layer):
    """What the layer does to its inputs, told from its outputs for the unit vectors."""
    scale = layer.boft_s["default"].squeeze(1)
    rotated = layer(torch.eye(layer.in_features, dtype=torch.float64)) / scale
    return torch.linalg.lstsq(layer.base_layer.weight, rotated.T).solution.T


def cayley(block):
    skew, eye = 0.5 * (block - block.T), torch.eye(len(block), dtype=torch.float64)
    return (eye - skew) @ torch.linalg.inv(eye + skew)


def test_blocks_are_laid_out_on_the_diagonal():
    blocks = torch.randn(2, 3, 4, 4)
    (dense,) = _BlockDiagonal.forward(blocks)
    for factor, expected in zip(blocks, dense, strict=True):
        assert torch.equal(torch.block_diag(*factor), expected)


def test_the_gradient_of_the_layout_is_that_of_block_diag():
    blocks = torch.randn(1, 3, 2, 2, requires_grad=True)
    gradient = torch.randn(1, 6, 6)
    torch.block_diag(*blocks[0]).backward(gradient[0])
    (found,) = _BlockDiagonal.backward(gradient, blocks.detach())
    assert torch.equal(found, blocks.grad)


@pytest.mark.parametrize("size", [4, 6])
def test_a_site_is_rotated_by_butterfly_factors_and_scaled(host_cases, size):
    layer = build(host_cases["language model"], size)
    factors, width = butterfly(size, [16])
    expected = torch.eye(16, dtype=torch.float64)
    for level in range(factors):
        # A factor pairs the inputs that lie 2^level blocks of half the width apart.
        half, stride = width // 2, 2**level
        groups = torch.arange(16).view(-1, 2, stride, half).transpose(1, 2).reshape(-1, width)
        factor = torch.zeros(16, 16, dtype=torch.float64)
        for block, group in zip(layer.boft_R["default"][level], groups, strict=True):
            factor[group[:, None], group] = cayley(block)
        expected = factor @ expected
    rotation = rotation_of(layer)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(rotation, expected)


def test_two_factors_mix_twice_as_many_inputs_as_one_block(host_cases):
    rotation = rotation_of(build(host_cases["language model"], 4))
    assert ((rotation.abs() > 1e-9).sum(dim=1) == 4).all()


def test_sizes_ascend_in_what_they_train_and_divide_every_width(host_cases):
    case = host_cases["language model"]  # inputs of 16 and 24
    assert METHOD.sizes(case.base(), case.setting()) == [4, 6, 8]
    assert [butterfly(size, [16, 24]) for size in (4, 6, 8)] == [(2, 2), (3, 2), (2, 4)]


def test_a_model_that_needs_too_much_memory_is_refused(host_cases, monkeypatch):
    case = host_cases["language model"]
    monkeypatch.setattr("rankflow.ablation.methods.boft._MOST_BYTES", 10_000)
    with pytest.raises(UnsupportedError, match="dense permutations"):
        METHOD.sizes(case.base(), case.setting())
