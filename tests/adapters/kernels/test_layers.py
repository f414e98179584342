"""Whole layers on the kernels against the same layers on torch's code."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from rankflow.adapters.dora import accelerate_dora
from rankflow.adapters.sites import find_sites

on_gpu = pytest.mark.parametrize(
    "device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
)
BOUND = 1e-5  # some roundings of float32, for sums of some hundred terms


@pytest.fixture
def dora(device, host, adapt, layer_cases):
    """Make a DoRA model around one layer on the device."""

    def make(kind, layer=None, **config):
        base = host(layer_cases[kind])
        if layer is not None:
            base.block["layer"] = layer
        model = adapt(base, use_dora=True, **config).to(device)
        accelerate_dora(model)
        return model

    return make


def outcome(model, x):
    """Output and gradients, with the same dropout each time."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(11)
    y = model(x)
    y.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": getattr(x, "grad", None)} | grads


def agree(mine, exact):
    assert mine.keys() == exact.keys()
    for name, value in exact.items():
        if value is None:
            assert mine[name] is None
        else:
            gap = (mine[name].double() - value.double()).abs().max() / value.abs().max()
            assert gap <= BOUND, name
    return True


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["linear", "linear without bias", "Conv1D of transformers"])
def test_a_linear_layer_is_that_of_torchs_code(
    kind, dropout, device, dora, layer_cases, monkeypatch
):
    model = dora(kind, lora_dropout=dropout).train()
    x = layer_cases[kind].inputs().to(device)
    twin = copy.deepcopy(model)
    mine = outcome(model, x)
    monkeypatch.setenv("RANKFLOW_TRITON", "0")
    assert agree(mine, outcome(twin, x))


def test_a_layer_uses_every_kernel(device, dora, layer_cases, kernels_in):
    model = dora("linear")
    x = layer_cases["linear"].inputs().to(device)
    assert kernels_in(lambda: outcome(model, x)) == {"row_norms", "mix", "mix_gradients"}


@pytest.mark.parametrize("kind", ["conv2d", "embedding"])
def test_other_layers_take_their_norms_from_the_kernel(
    device, kind, dora, layer_cases, kernels_in, monkeypatch
):
    model = dora(kind)
    x = layer_cases[kind].inputs().to(device)
    twin, results = copy.deepcopy(model), []
    assert kernels_in(lambda: results.append(outcome(model, x))) == {"row_norms"}
    monkeypatch.setenv("RANKFLOW_TRITON", "0")
    assert agree(results[0], outcome(twin, x))


# torch's own tracer makes an instance of autograd.Function, and torch warns of it.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_uses_the_kernels_without_a_break_at_every_rank(device, bias, dora):
    torch._dynamo.reset()
    model = dora("linear", nn.Linear(6, 5, bias=bias))
    (site,) = find_sites(model)
    graphs = []

    def keep(graph, _):
        graphs.append(kernels_of(graph))
        return make_boxed_func(graph)

    compiled = torch.compile(site.layer, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    x = torch.randn(7, 6, device=device)
    with torch._dynamo.config.patch(
        force_parameter_static_shapes=False, force_nn_module_property_static_shapes=False
    ):
        for rank in (4, 7, 2):
            site.install(
                *(nn.Parameter(torch.randn(n, device=device)) for n in ((rank, 6), (5, rank)))
            )
            torch._dynamo.mark_dynamic(site.A, 0)
            torch._dynamo.mark_dynamic(site.B, 1)
            mine = {name.removeprefix("_orig_mod."): v for name, v in outcome(compiled, x).items()}
            assert agree(mine, outcome(site.layer, x))
    assert graphs == [{"row_norms", "mix"}, {"mix_gradients"}]  # forward and backward, once
    torch._dynamo.reset()


def kernels_of(graph):
    names = {str(node.target) for node in graph.graph.nodes}
    return {name.split(".")[1] for name in names if name.startswith("rankflow.")}


def train(model, x, optimizer):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@on_gpu
def test_a_step_waits_for_nothing(dora):
    model = dora("linear", nn.Linear(256, 192), lora_dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
    x = torch.randn(64, 256, device="cuda")
    train(model, x, optimizer)
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(model, x, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
def test_a_captured_graph_follows_what_it_is_given(dora):
    model = dora("linear", nn.Linear(256, 192)).eval()
    x = torch.randn(64, 256, device="cuda")
    with torch.no_grad():
        model(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = model(x)
        x.normal_()
        graph.replay()
        torch.testing.assert_close(y, model(x))


@on_gpu
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_layer_runs_compiled_with_less_overhead(dora):
    torch._dynamo.reset()
    model = dora("linear", nn.Linear(256, 192))
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(3):
        x = torch.randn(64, 256, device="cuda")
        mine = {name.removeprefix("_orig_mod."): v for name, v in outcome(compiled, x).items()}
        assert agree(mine, outcome(model, x))
    torch._dynamo.reset()
