"""A run whose model is compiled: nothing breaks the graph, and only events compile anew."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import clip_grad_norm_

from rankflow.engine import RankFlow
from rankflow.specs.budget import BudgetSpec

STEPS = 11
EVENTS = {5, 9}
BUDGET = {
    "rank": 3,
    "warmup": 5,
    "every": 5,
    "cooldown": 2,
    "start": 2.0,
    "schedule": "linear",  # so that each event changes ranks
    "protect": 0,
    "grow": "orthogonal",
}
# The settings under which a rank is a size like any other.
DYNAMIC = {
    "force_parameter_static_shapes": False,
    "force_nn_module_property_static_shapes": False,
}

pytestmark = [
    pytest.mark.skipif(
        not torch._dynamo.is_dynamo_supported(), reason="torch.compile does not run here"
    ),
    # torch's own tracer makes an instance of autograd.Function, and torch warns of it.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Run:
    """A tiny Llama in training, compiled or not, from the same start."""

    def __init__(self, make, adapt, compiler, device="cpu", **budget):
        torch.manual_seed(3)
        use_dora = "magnitude" in budget
        base = make()
        del base.model.layers[1:]  # compilers take their time for each layer
        model = adapt(base, r=4, target_modules="all-linear", use_dora=use_dora).to(device)
        self.model = model
        self.flow = RankFlow(model, BudgetSpec(**(BUDGET | budget)), total_steps=STEPS)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)
        self.forward = compiler(model)
        self.tokens = torch.arange(24, device=device).view(2, 12) % 13
        self.losses = []

    def step(self):
        loss = self.forward(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        clip_grad_norm_(self.model.parameters(), 1.0)
        self.flow.observe(loss=loss)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.detach())
        return self.flow.step(self.optimizer)


KINDS = {"LoRA": {}, "hybrid": {"magnitude": "budgeted"}}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_only_events_compile_anew_and_losses_are_those_without(kind, llama, adapt):
    counter = CompileCounterWithBackend("aot_eager")
    run = Run(llama, adapt, lambda m: torch.compile(m, backend=counter, fullgraph=True), **kind)
    plain = Run(llama, adapt, lambda m: m, **kind)
    compiled = []
    for step in range(1, STEPS + 1):
        assert (run.step() is not None) == (plain.step() is not None) == (step in EVENTS)
        compiled.append(counter.frame_count)
    assert compiled == [1] * 5 + [2] * 4 + [3] * 2
    assert [e.ranks for e in run.flow.history] == [e.ranks for e in plain.flow.history]
    assert len({tuple(event.ranks.values()) for event in run.flow.history}) == 2
    torch.testing.assert_close(run.losses, plain.losses, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_with_dynamic_shapes_not_even_events_compile_anew(kind, llama, adapt):
    """Ranks of at least 2, since torch compiles sizes of 0 and 1 apart."""
    counter = CompileCounterWithBackend("aot_eager")
    kind = kind | {"min_rank": 2, "score": "random"}
    if "magnitude" in kind:
        kind["magnitude"] = "always"
    with torch._dynamo.config.patch(DYNAMIC):
        run = Run(llama, adapt, lambda m: torch.compile(m, backend=counter, fullgraph=True), **kind)
        plain = Run(llama, adapt, lambda m: m, **kind)
        for _ in range(STEPS):
            for site in run.flow._sites:
                torch._dynamo.mark_dynamic(site.A, 0)
                torch._dynamo.mark_dynamic(site.B, 1)
            run.step()
            plain.step()
    assert counter.frame_count == 1
    assert len({tuple(event.ranks.values()) for event in run.flow.history}) == 2
    torch.testing.assert_close(run.losses, plain.losses, rtol=1e-4, atol=1e-5)
