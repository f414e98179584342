"""Gate gradients by the kernel are those of torch, whatever becomes of the tensors in between."""

import weakref

import pytest
import torch
from torch import nn

from rankflow.adapters.gating import convert
from rankflow.adapters.sites import find_sites
from rankflow.importance import dots, gate, magnitudes
from rankflow.importance.dots import Dots
from rankflow.importance.magnitudes import make_magnitude_scorer
from rankflow.importance.registry import make_scorer

ROWS, LENGTHS = [3, 0, 1, 8, 2], [5, 7, 4500, 130, 1]


def make_parameters(device, dtype=torch.float32):
    shapes = zip(ROWS, LENGTHS, strict=True)
    parameters = [nn.Parameter(torch.randn(shape).to(device, dtype)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(parameter)
    return parameters


def exact(parameters, subtracted=None):
    """The dot products in float64, and the sum of their terms' sizes."""
    terms = []
    for i, parameter in enumerate(parameters):
        moved = parameter.detach().double()
        if subtracted is not None:
            n = subtracted[i].double().view_as(moved)
            moved = torch.where(n > torch.finfo(torch.float32).tiny, moved - n, 0)
        terms.append(moved * (0 if parameter.grad is None else parameter.grad.double()))
    total = torch.cat([t.sum(1) for t in terms])
    return total, torch.cat([t.abs().sum(1) for t in terms])


def agrees(found, parameters, subtracted=None):
    total, size = exact(parameters, subtracted)
    return found.dtype == torch.float32 and ((found - total).abs() <= 1e-6 * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_they_are_those_of_float64(dtype, device):
    parameters = make_parameters(device, dtype)
    table = Dots(parameters, ROWS, LENGTHS)
    assert agrees(table.read(), parameters)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_taken_off_and_a_row_of_zeros_is_left_out(dtype, device):
    parameters = make_parameters(device, dtype)
    norms = [torch.rand(p.numel(), device=device) for p in parameters]
    norms[0][2], norms[2][17] = 0.0, torch.finfo(torch.float32).tiny
    table = Dots(parameters, ROWS, LENGTHS)
    assert agrees(table.read(norms), parameters, norms)


def test_they_are_the_same_bits_at_every_call(device):
    parameters = make_parameters(device)
    table = Dots(parameters, ROWS, LENGTHS)
    assert torch.equal(table.read(), table.read())
    assert torch.equal(table.read(), Dots(parameters, ROWS, LENGTHS).read())


def test_gradients_may_come_go_and_move_from_step_to_step(device):
    parameters = make_parameters(device)
    table = Dots(parameters, ROWS, LENGTHS)
    for step in range(6):
        if step == 2:
            parameters[3].grad = None  # counts as zeros
        if step == 3:  # a bucket of DistributedDataParallel holds them end to end
            bucket = torch.randn(sum(p.numel() for p in parameters), device=device)
            views = bucket.split([p.numel() for p in parameters])
            for parameter, view in zip(parameters, views, strict=True):
                parameter.grad = view.view_as(parameter)
        if step > 3:
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
        assert agrees(table.read(), parameters)


def test_weights_may_move_too(device):
    parameters = make_parameters(device)
    table = Dots(parameters, ROWS, LENGTHS)
    before = table.read()
    for parameter in parameters:
        parameter.data = 2 * parameter.data
    assert torch.equal(table.read(), 2 * before)


def test_addresses_go_to_the_device_only_if_one_has_changed(device, monkeypatch):
    from rankflow.adapters.kernels import addresses

    uploads = []
    upload = addresses.upload
    monkeypatch.setattr(
        addresses, "upload", lambda *arguments: uploads.append(1) or upload(*arguments)
    )
    parameters = make_parameters(device)
    table = Dots(parameters, ROWS, LENGTHS)
    for _ in range(3):
        table.read()
    assert len(uploads) == 1
    held, parameters[0].grad = parameters[0].grad, torch.randn_like(parameters[0])
    table.read()
    assert len(uploads) == 2
    assert held is not parameters[0].grad


def test_the_table_keeps_no_gradient_alive(device):
    parameters = make_parameters(device)
    table = Dots(parameters, ROWS, LENGTHS)
    table.read()
    gone = weakref.ref(parameters[0].grad.untyped_storage())
    alive = weakref.ref(parameters[0].grad)
    parameters[0].grad = None
    assert alive() is None
    assert gone() is None


@pytest.mark.parametrize(
    "spoil",
    [
        lambda p: setattr(p[3], "grad", torch.randn(130, 8, device=p[3].device).T),
        lambda p: setattr(p[3], "data", p[3].data.double()) or setattr(p[3], "grad", None),
        lambda p: setattr(p[3], "data", p[3].data.bfloat16()) or setattr(p[3], "grad", None),
        lambda p: setattr(p[3], "data", torch.randn(130, 8, device=p[3].device).T),
    ],
    ids=["gradient across", "float64", "mixed", "weight across"],
)
def test_torch_has_to_do_what_the_table_does_not_tell(spoil, device):
    parameters = make_parameters(device)
    table = Dots(parameters, ROWS, LENGTHS)
    assert table.read() is not None
    spoil(parameters)
    assert table.read() is None


def test_nothing_is_read_where_kernels_do_not_run(monkeypatch):
    monkeypatch.setattr(dots, "fits", lambda *tensors: False)
    assert Dots(make_parameters("cpu"), ROWS, LENGTHS).read() is None


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", ["taylor", "fisher"])
def test_scores_by_the_kernel_are_those_of_torch(name, gated, mixed, device, monkeypatch):
    """Every kind of layer; a site has no components, one no gradient, one no magnitude."""
    scores = []
    for by_kernel in (True, False):
        if not by_kernel:
            for module in (gate, magnitudes):
                monkeypatch.setattr(module, "Dots", lambda *_: dots.Dots([], [], []))
        torch.manual_seed(1)
        model = mixed(use_dora=True).to(device)
        sites = find_sites(model)
        if gated:
            convert(sites, "gated")
        sites[2].layer.lora_magnitude_vector["default"].weight = nn.Parameter(
            torch.zeros(0, device=device)
        )
        sites[2].update_variant()
        made = [
            make_scorer(name, sites, decay=0.5, seed=0),
            make_magnitude_scorer(name, sites, decay=0.5, seed=0),
        ]
        assert (made[0]._dots.read() is not None) == by_kernel
        one = torch.ones((), device=device)
        for _ in range(3):
            model(torch.randint(12, (3, 4), device=device)).square().sum().backward()
            sites[1].A.grad = None
            for scorer in made:
                scorer.observe(one / 2, one > 0)
        scores.append([scorer.read() for scorer in made])
    for of_kernel, of_torch in zip(*scores, strict=True):
        assert of_torch.any()
        torch.testing.assert_close(of_kernel, of_torch, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(kind, subtracts, absent_gpu, compile_for):
    triton = pytest.importorskip("triton")
    from rankflow.adapters.kernels.row_dots import _dot_rows

    constants = {
        "TYPE": getattr(triton.language, kind),
        "SUBTRACTED": triton.language.float32,
        "SUBTRACTS": subtracts,
        "TINY": torch.finfo(torch.float32).tiny,
        "BLOCK": 4096,
    }
    signature = {"rows": "*i64", "addresses": "*i64", "dots": "*fp32", "tensors": "i32"}
    compiled = compile_for(absent_gpu, _dot_rows, signature, constants)
    assert compiled.metadata.shared <= 64 * 2**10
