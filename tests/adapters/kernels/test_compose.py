"""The kernels of DoRA's output and its gradients against dense arithmetic in float64."""

import pytest
import torch

from rankflow.adapters.compose import Compose

SCALE = 1.5
PARTS = ["y", "base", "x", "A", "B", "magnitude", "bias"]
# Allowed against the largest entry. In low precision A and A x are rounded, half an ulp each, and B
# and the result too, or cut off by the interpreter, an ulp each; a sum of such terms may be smaller
# than its largest one.
BOUNDS = {torch.float32: 5e-6, torch.bfloat16: 8 * 2.0**-9, torch.float16: 8 * 2.0**-12}


@pytest.fixture
def case(random):
    """Make the arguments of Compose, as after some training."""

    def make(tokens, features, out, rank, dtype=torch.float32, bias=True):
        norms = 1 + random(out).square()
        return {
            "base": random(tokens, out, dtype=dtype),
            "x": random(tokens, features, dtype=dtype),
            "A": random(rank, features) / features**0.5,
            "B": random(out, rank) / max(1, rank) ** 0.5,
            "magnitude": norms * (1 + 0.3 * random(out)),
            "bias": random(out, dtype=dtype) if bias else None,
            "norms": norms,
            "scale": SCALE,
        }

    return make


def outcome(compute, arguments, g):
    """Output and all gradients, where g is the gradient of the output."""
    leaves = {
        name: value.detach().clone().requires_grad_()
        for name, value in arguments.items()
        if name in PARTS and value is not None
    }
    y = compute(*(arguments | leaves).values())
    y.backward(g)
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def dense(base, x, A, B, magnitude, bias, norms, scale):
    c = magnitude / norms
    bias = 0 if bias is None else bias
    return c * (base - bias) + bias + scale * c * (x @ A.T @ B.T)


def exact_outcome(arguments, g):
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    return outcome(dense, wide, g.double())


def agree(mine, exact, bound):
    assert mine.keys() == exact.keys()
    gaps = {
        n: ((mine[n].double() - e).abs().max() / e.abs().max()).item() for n, e in exact.items()
    }
    assert {name: gap for name, gap in gaps.items() if not gap <= bound} == {}
    return True


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rank", [1, 3, 8, 33, 384])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_output_and_gradients_are_the_dense_ones_for_every_rank(
    dtype, rank, bias, case, random, kernels_in
):
    arguments = case(37, 50, 70, rank, dtype, bias)
    g = random(37, 70, dtype=dtype)
    results = []
    used = kernels_in(lambda: results.append(outcome(Compose.apply, arguments, g)))
    assert used == {"mix", "mix_gradients"}
    for name, value in results[0].items():
        assert value.dtype == (dtype if name == "y" else arguments[name].dtype)
    assert agree(results[0], exact_outcome(arguments, g), BOUNDS[dtype])


@pytest.mark.parametrize(
    ("tokens", "out"), [(1, 1), (1, 200), (600, 3), (130, 65), (64, 64), (300, 130)]
)
def test_output_and_gradients_are_the_dense_ones_for_every_shape(tokens, out, case, random):
    arguments, g = case(tokens, 20, out, 3), random(tokens, out)
    mine = outcome(Compose.apply, arguments, g)
    assert agree(mine, exact_outcome(arguments, g), BOUNDS[torch.float32])


def test_tokens_need_not_be_in_one_row_nor_contiguous(case, random):
    arguments = case(24, 20, 70, 3)
    arguments["base"] = random(70, 4, 6).permute(2, 1, 0)
    arguments["x"] = random(6, 8, 20)[:, ::2]
    g = random(6, 1, 70).expand(6, 4, 70)
    mine = outcome(Compose.apply, arguments, g)
    assert agree(mine, exact_outcome(arguments, g), BOUNDS[torch.float32])


def test_without_components_it_only_scales(case, random):
    arguments, g = case(37, 20, 70, 0), random(37, 70)
    mine, exact = outcome(Compose.apply, arguments, g), exact_outcome(arguments, g)
    assert mine.pop("A").shape == (0, 20)
    assert mine.pop("B").shape == (70, 0)
    assert mine.pop("x").count_nonzero() == exact.pop("x").count_nonzero() == 0
    assert agree(mine, {name: exact[name] for name in mine}, BOUNDS[torch.float32])


def test_without_tokens_the_gradients_are_zeros(case, random):
    mine = outcome(Compose.apply, case(0, 20, 70, 3), random(0, 70))
    assert mine["y"].shape == (0, 70)
    assert all(mine[name].count_nonzero() == 0 for name in ("A", "B", "magnitude", "bias"))


@pytest.mark.parametrize("bias", [False, True])
def test_the_output_is_rounded_once(bias, case, random):
    arguments = case(64, 20, 200, 3, torch.bfloat16, bias)
    arguments["B"] *= 0
    arguments["base"] = arguments["base"].abs()  # no cancellation
    arguments["magnitude"] = arguments["norms"] * (1 + 7 * torch.rand_like(arguments["norms"]))
    if bias:
        arguments["bias"] = -arguments["bias"].abs()
        arguments["base"] += 1 - 8 * arguments["bias"]
    y = Compose.apply(*arguments.values())
    wide = {n: v.double() if isinstance(v, torch.Tensor) else v for n, v in arguments.items()}
    exact = dense(**wide)
    assert (exact > 0).all()
    # A GPU rounds to the nearer of two numbers, and the interpreter to the lower.
    bound = 2.0**-8 if y.is_cuda else 2.0**-7
    assert (y.double() / exact - 1).abs().max() <= bound * (1 + 1e-4)


def test_a_row_of_zeros_has_no_gradient_of_its_magnitude(case, random):
    arguments = case(37, 20, 70, 3)
    arguments["norms"][5] = torch.finfo(torch.float32).tiny
    arguments["base"][:, 5] = arguments["bias"][5] + 1e-3 * random(37)
    arguments["B"][5] = 0
    mine = outcome(Compose.apply, arguments, random(37, 70))
    assert mine["magnitude"][5] == 0
    assert torch.equal(mine["y"][:, 5], arguments["base"][:, 5])
    assert all(torch.isfinite(value).all() for value in mine.values())


@pytest.mark.parametrize("wanted", [("base",), ("x",), ("A",), ("B", "bias"), ("magnitude",)])
def test_only_what_is_wanted_gets_a_gradient_and_it_is_the_same(wanted, case, random):
    arguments, g = case(37, 20, 70, 3), random(37, 70)
    every = outcome(Compose.apply, arguments, g)
    leaves = {name: arguments[name].clone().requires_grad_() for name in wanted}
    Compose.apply(*(arguments | leaves).values()).backward(g)
    for name, leaf in leaves.items():
        assert torch.equal(leaf.grad, every[name])


def test_a_gradient_that_is_not_wanted_takes_no_memory(case, random):
    from rankflow.adapters.kernels.compose import mix_gradients

    a, g = case(37, 20, 70, 3), random(37, 70)
    hidden, factor = a["A"] @ a["x"].T, a["magnitude"] / a["norms"]
    rest = (hidden, a["B"], factor, a["norms"], a["bias"], SCALE)
    d_base, _, _, d_bias = mix_gradients(g, a["base"], *rest, False, False)
    assert d_base.numel() == d_bias.numel() == 0


@pytest.mark.parametrize("rank", [8, 140])
def test_the_same_bits_come_out_each_time(rank, case, random):
    arguments, g = case(600, 20, 70, rank, torch.bfloat16), random(600, 70, dtype=torch.bfloat16)
    first, second = (outcome(Compose.apply, arguments, g) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("bias", [False, True])
def test_the_operators_keep_torchs_rules(bias, case, random):
    a, g = case(6, 5, 7, 3, bias=bias), random(6, 7)
    hidden, factor = a["A"] @ a["x"].T, a["magnitude"] / a["norms"]
    parts = (a["base"], hidden, a["B"], factor)
    operators = torch.ops.rankflow
    torch.library.opcheck(operators.mix.default, (*parts, a["bias"], SCALE))
    rest = (a["norms"], a["bias"], SCALE, True, bias)
    torch.library.opcheck(operators.mix_gradients.default, (g, *parts, *rest))
