"""Between events the host never waits for the device."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from rankflow.engine import RankFlow
from rankflow.importance.gate import Taylor
from rankflow.specs.budget import BudgetSpec

SCORES = ["frobenius", "norm", "sensitivity", "tangential", "taylor", "fisher", "random", "uniform"]
# An event after every fourth step, with a window of two steps to sketch the gradient before it.
MOVES = {
    "rank": 2,
    "warmup": 0,
    "cooldown": 2,
    "every": 4,
    "policy": "threshold",
    "recycle": 0.9,
    "hysteresis": 0.0,
    "protect": 0,
    "grow": "gradient",
    "grow_steps": 2,
}
BUDGETS = {
    **{score: {"score": score} for score in SCORES},
    **{
        f"{score}, magnitudes too": {"score": score, "magnitude": "budgeted"}
        for score in SCORES
        if score != "frobenius"
    },
    "gated": {"components": "gated", "score": "taylor", "dem": 0.5},
    "VeRA": {"components": "vera", "rank": None, "params": 58, "max_rank": 3},
}
STEPS = 10
FUSED = partial(AdamW, fused=True)


class Loop:
    """A training loop on a net of every kind of layer, on a device of that kind."""

    def __init__(self, mixed, device, *, make_optimizer=AdamW, use_dora=True, **budget):
        model = mixed(use_dora=use_dora, trained=False).to(device)
        spec = BudgetSpec(**{k: v for k, v in (MOVES | budget).items() if v is not None})
        self.model, self.device = model, device
        self.flow = RankFlow(model, spec, total_steps=STEPS)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.trained, lr=0.05)
        self.tokens = torch.randint(12, (3, 4)).to(device)

    @property
    def is_due(self):
        return self.flow.resolved.scheduler.is_due(self.flow.steps + 1)

    def step(self, clip=True):
        loss = self.model(self.tokens).square().sum()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.flow.observe(loss=loss.detach())
        self.flow.mute_bad_step()
        self.flow.regularise()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.flow.step(self.optimizer)


def run(loop, waits, made_up):
    """Train to the end; return the places that wait between events, and the events."""
    places, events = [], []
    while loop.flow.steps < STEPS:
        if loop.is_due:
            with made_up():
                event = loop.step()
            assert event is not None
            events.append(event)
        else:
            with waits(loop.device) as noted:
                loop.step()
            places += noted.places
    return places, events


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_nothing_is_read_of_a_device_whose_numbers_do_not_exist(budget, mixed, waits, made_up):
    with made_up():
        loop = Loop(mixed, "meta", **budget)
    places, events = run(loop, waits, made_up)
    assert places == []
    assert len(events) == 2


@pytest.mark.parametrize("score", SCORES)
def test_nor_in_lora_where_newborns_are_young(score, mixed, waits, made_up):
    with made_up():
        loop = Loop(mixed, "meta", use_dora=False, score=score)
    places, events = run(loop, waits, made_up)
    assert places == []
    assert sum(len(event.born) for event in events) > 0
    assert any(min(steps, default=30) < 30 for steps in loop.flow._observers.fair_start.lived())


@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
@pytest.mark.usefixtures("as_on_a_device")
def test_nothing_is_read_on_a_cpu_either(budget, mixed, waits, made_up):
    places, events = run(Loop(mixed, "cpu", make_optimizer=FUSED, **budget), waits, made_up)
    assert places == []
    assert len(events) == 2


@pytest.mark.usefixtures("as_on_a_device")
def test_a_gradient_scaler_and_a_fused_optimizer_do_not_change_that(mixed, waits, made_up):
    """The scaler finds an overflow while newborns are young, and the optimizer skips the step."""
    loop = Loop(mixed, "cpu", make_optimizer=FUSED)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    places = []

    def step(spoil):
        scaler.scale(loop.model(loop.tokens).square().sum()).backward()
        if spoil:
            loop.flow._sites[-1].B.grad.fill_(float("inf"))
        scaler.unscale_(loop.optimizer)
        loop.flow.observe(loss_scale=scaler._scale)
        scaler.step(loop.optimizer)
        scaler.update()
        loop.optimizer.zero_grad(set_to_none=True)
        loop.flow.step(loop.optimizer)

    for number in range(STEPS):
        if loop.is_due:
            step(spoil=False)
            continue
        with waits("cpu") as noted:
            step(spoil=number == 6)
        places += noted.places
    assert places == []
    assert scaler.get_scale() == 512.0
    assert any(min(steps, default=30) < 30 for steps in loop.flow._observers.fair_start.lived())


class Reading(Taylor):
    """A scorer that waits, by one of many ways."""

    def __init__(self, sites, read):
        super().__init__(sites, 0.9)
        self._read = read

    def observe(self, unclip, accept):
        self._read(accept)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    "read",
    [
        Tensor.item,
        Tensor.tolist,
        bool,
        int,
        lambda accept: 1 if accept else 0,
        lambda accept: accept.view(1).nonzero(),
        lambda accept: torch.ones(1, device=accept.device)[accept.view(1)],
        lambda accept: torch.masked_select(accept, accept),
        lambda accept: torch.equal(accept, accept),
    ],
)
@pytest.mark.usefixtures("as_on_a_device")
def test_whoever_waits_is_found(read, device, mixed, waits, made_up):
    with made_up():
        optimizer = FUSED if device == "cpu" else AdamW
        loop = Loop(mixed, device, make_optimizer=optimizer)
    loop.flow._observers.tracker.scorers["components"] = Reading(loop.flow._sites, read)
    with waits(device) as noted:
        if device == "meta":
            with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
                loop.step()
            return
        loop.step()
    assert noted.places
    assert all(Path(__file__).name in place for place in noted.places)


@pytest.mark.parametrize(
    "copy",
    [
        lambda here: torch.tensor(1.0, device=here.device),
        lambda here: torch.ones(2).to(here.device),
        lambda here: here.copy_(torch.ones(())),
        lambda here: here.new_tensor([1.0]),
    ],
)
def test_a_copy_from_the_host_that_waits_is_found(copy, mixed, waits, made_up):
    with made_up():
        loop = Loop(mixed, "meta")
    loop.flow._observers.tracker.scorers["components"] = Reading(loop.flow._sites, copy)
    with waits("meta") as noted:
        loop.step()
    assert noted.places


@pytest.mark.gpu
@pytest.mark.parametrize("budget", BUDGETS.values(), ids=BUDGETS)
def test_cuda_itself_sees_no_wait(budget, mixed):
    loop = Loop(mixed, "cuda", make_optimizer=FUSED, **budget)
    events = [loop.step() for _ in range(5)]  # one event, so that all that is made once is made
    while loop.flow.steps < STEPS:
        if loop.is_due:
            events.append(loop.step())
            continue
        torch.cuda.set_sync_debug_mode("error")
        try:
            loop.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum(event is not None for event in events) == 2


@pytest.mark.gpu
def test_cuda_itself_sees_a_scorer_that_waits(mixed):
    loop = Loop(mixed, "cuda")
    loop.step()
    loop.flow._observers.tracker.scorers["components"] = Reading(loop.flow._sites, Tensor.item)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            loop.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
