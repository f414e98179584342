"""An event, a restore and the construction of the engine, interrupted at each step of them.

One engine is interrupted over and over, at every line of RankFlow's code and at every operation of
torch, and must each time be bit for bit what it was; when nothing interrupts it at last, it must
become what a twin became at once.
"""

import copy
import sys
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rankflow
from rankflow.engine import RankFlow
from rankflow.errors import SurgeryError
from rankflow.specs.budget import BudgetSpec

HOME = str(Path(rankflow.__file__).parent)
MOVES = {"warmup": 2, "cooldown": 4, "every": 4, "decay": 0.5, "protect": 0}
CHURN = MOVES | {"recycle": 0.6, "hysteresis": 0.0, "grow_steps": 3}
BUDGETS = {
    "LoRA": BudgetSpec(**CHURN, rank=2),
    "DoRA, magnitudes budgeted": BudgetSpec(
        **CHURN, rank=2.5, magnitude="budgeted", score="random", policy="threshold"
    ),
    "DoRA, magnitudes rescaled": BudgetSpec(
        **CHURN, rank=2, score="sensitivity", renormalise="keep-scale", grow="orthogonal"
    ),
    "gated": BudgetSpec(**CHURN, rank=2, components="gated", dem=0.1),
    "VeRA": BudgetSpec(**CHURN | {"recycle": 0.9}, params=32, max_rank=6, components="vera"),
}
FIRST_EVENT = 2
NEVER = sys.maxsize


class Net(nn.Module):
    """Three layers of different shapes and a head."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 10)
        self.third = nn.Linear(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))))


def make_model(kind):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        use_rslora=True,
        use_dora=kind.startswith("DoRA"),
        target_modules=["first", "second", "third"],
        modules_to_save=["head"],
    )
    return peft.get_peft_model(Net(), config)


class Run:
    """A model, its engine and its optimizer."""

    def __init__(self, kind):
        self.model = make_model(kind)
        self.flow = RankFlow(self.model, BUDGETS[kind], 16)
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trainable, lr=0.02, amsgrad=True)
        self.flow.attach(self.optimizer)

    def step(self, number):
        self.update(number)
        return self.flow.step(self.optimizer)

    def update(self, number):
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 6, generator=generator)
        labels = torch.randint(3, (16,), generator=generator)
        self.optimizer.zero_grad(set_to_none=True)  # so that an event meets gradients
        functional.cross_entropy(self.model(x), labels).backward()
        self.flow.observe()
        self.optimizer.step()

    def until_due(self):
        """Stop where the first event is due, and another one has been before it."""
        for number in range(FIRST_EVENT + 3):
            self.step(number)
        self.update(FIRST_EVENT + 3)
        self.flow._steps += 1
        return self

    def reallocate(self):
        return self.flow._reallocate(self.flow.steps)

    def go_on(self):
        self.flow._look_ahead()
        for number in range(6, 9):
            self.step(number)


class AtLine:
    """Raises at the n-th line of RankFlow's own code within the block."""

    def __init__(self, n, error=KeyboardInterrupt):
        self.left, self.error = n, error

    def __enter__(self):
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)

    def _trace(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(HOME):
            return None
        if event == "line":  # a call may be that of a generator which is thrown away
            self.left -= 1
            if self.left == 0:
                raise self.error
        return self._trace


class AtOperation(TorchDispatchMode):
    """Runs out of memory at the n-th operation within the block."""

    def __init__(self, n, error=torch.OutOfMemoryError):
        super().__init__()
        self.left, self.error = n, error

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.left -= 1
        if self.left == 0:
            raise self.error("no memory is left")
        return function(*arguments, **(keywords or {}))


class AtAllocation(AtOperation):
    """Runs out of memory at the n-th operation that takes some, instead of that."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        given = {t.untyped_storage()._cdata for t in tensors_in((arguments, keywords))}
        result = function(*arguments, **(keywords or {}))
        made = [t for t in tensors_in(result) if t.untyped_storage()._cdata not in given]
        self.left -= any(t.numel() > 0 for t in made)
        if self.left == 0:
            self.left -= 1
            del made
            raise self.error("no memory is left")
        return result


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def contents(value):
    """Copy what a value holds, so that it can be held against it later."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: contents(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [contents(inner) for inner in value]
    return copy.copy(value) if isinstance(value, set) else value


def are_equal(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(are_equal(v, other[k]) for k, v in one.items())
    if isinstance(one, list):
        return len(one) == len(other) and all(map(are_equal, one, other))
    return one == other


def hooks_of(model):
    """All hooks, of modules and of parameters."""
    kinds = ("_forward_hooks", "_forward_hooks_with_kwargs", "_state_dict_hooks")
    modules = [dict(getattr(m, k)) for m in model.modules() for k in kinds]
    modules += [list(m._load_state_dict_pre_hooks) for m in model.modules()]
    return modules, [dict(p._post_accumulate_grad_hooks or {}) for p in model.parameters()]


def of_model(model):
    """Everything about a model that may change, the identity of its parameters included."""
    layers = [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    records = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_variant")
    config = model.peft_config["default"]
    return {
        "identity": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "values": contents(list(model.parameters())),
        "gradients": contents([p.grad for p in model.parameters()]),
        "saved": contents(model.state_dict()),
        "layers": [{key: dict(getattr(m, key)) for key in records} for m in layers],
        "shapes": [(type(m).__name__, m.extra_repr()) for m in model.modules()],
        "config": (id(config), copy.deepcopy(config.to_dict())),
        "hooks": hooks_of(model),
    }


def of_engine(flow):
    state = contents(flow.state_dict())
    state["history"] = [replace(event, seconds=0.0) for event in flow.history]
    return state | {"ranks now": flow.ranks, "limit now": flow.limit, "steps now": flow.steps}


def of_optimizer(optimizer):
    return {
        "groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "keys": [id(p) for p in optimizer.state],
        "state": contents(optimizer.state_dict()),
    }


def of_run(run):
    return of_model(run.model) | {
        "engine": of_engine(run.flow),
        "optimizer": of_optimizer(run.optimizer),
    }


def outcome(run):
    """What two runs have in common that did the same."""
    return {
        "values": contents(run.model.state_dict()),
        "engine": of_engine(run.flow),
        "optimizer": contents(run.optimizer.state_dict()),
        "config": run.model.peft_config["default"].to_dict(),
        "hooks": [[len(hooks) for hooks in part] for part in hooks_of(run.model)],
    }


def assert_equal(found, expected, where=""):
    for key, value in expected.items():
        if isinstance(value, dict) and isinstance(found[key], dict):
            assert_equal(found[key], value, f"of {key} {where}")
        assert are_equal(value, found[key]), f"{key} changed {where}"


def interrupt(action, look, make, points):
    """Interrupt an action at one point after the other, and return how often.

    Args:
        action: What is interrupted; it is done when this returns.
        look: Returns all that must not change.
        make: Makes an interruption at a point.
        points: Distance of the points.
    """
    before = look()
    count = 0
    while True:
        at = 1 + points * count
        interruption = make(at)
        try:
            with interruption:
                action()
        except BaseException as error:
            assert interruption.left <= 0, "it failed by itself"
            cause = error.__cause__ if isinstance(error, SurgeryError) else error
            assert isinstance(cause, interruption.error)
            assert_equal(look(), before, f"at point {at}")
            del error, cause
        else:
            return count
        count += 1


def check_event(kind, make, points):
    run, twin = Run(kind).until_due(), Run(kind).until_due()
    assert_equal(outcome(run), outcome(twin))
    with make(NEVER):  # watched operations may round differently
        event = twin.reallocate()
    assert event.pruned
    assert event.born
    count = interrupt(run.reallocate, lambda: of_run(run), make, points)
    assert_equal(outcome(run), outcome(twin), "after the event")
    for each in (run, twin):
        each.go_on()
    assert_equal(outcome(run), outcome(twin), "in the steps after the event")
    return count


def check_construction(kind, make, points):
    model, twin = make_model(kind), make_model(kind)
    with make(NEVER):
        RankFlow(twin, BUDGETS[kind], 16)
    kept = []
    count = interrupt(
        lambda: kept.append(RankFlow(model, BUDGETS[kind], 16)),
        lambda: of_model(model),
        make,
        points,
    )
    assert are_equal(contents(model.state_dict()), contents(twin.state_dict()))
    assert kept[0].ranks
    return count


def check_restore(kind, make, points):
    ahead = Run(kind)
    for number in range(FIRST_EVENT + 2):
        ahead.step(number)
    state = ahead.flow.state_dict()
    run = Run(kind).until_due()
    run.reallocate()
    count = interrupt(lambda: run.flow.load_state_dict(state), lambda: of_run(run), make, points)
    assert_equal(of_engine(run.flow), of_engine(ahead.flow), "after the restore")
    return count


CHECKS = {"event": check_event, "construction": check_construction, "restore": check_restore}
WAYS = {"line": (AtLine, 101), "operation": (AtOperation, 11)}


@pytest.mark.fault("surgery interrupted at each line, or without memory at each operation")
@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS.keys())
@pytest.mark.parametrize("kind", BUDGETS)
@pytest.mark.parametrize(("make", "points"), WAYS.values(), ids=WAYS.keys())
def test_whatever_interrupts_it_nothing_has_changed_and_then_it_succeeds(
    check, kind, make, points, count_injections, request
):
    is_full = request.config.getoption("full", False)
    count_injections(check(kind, make, 1 if is_full else points))


@pytest.mark.fault("no memory at each allocation of an event")
@pytest.mark.parametrize("kind", BUDGETS)
def test_an_event_without_memory_for_any_of_its_tensors_is_undone(kind, count_injections):
    count_injections(check_event(kind, AtAllocation, 1))
