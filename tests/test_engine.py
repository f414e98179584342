import copy
import json
import warnings
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.nn import functional
from transformers.optimization import Adafactor

from rankflow.adapters.sites import find_sites
from rankflow.checkpoint import load_state, save_state
from rankflow.engine import RankFlow
from rankflow.errors import (
    BudgetError,
    CheckpointError,
    DivergenceError,
    RankFlowError,
    SiteError,
    SpecError,
    SurgeryError,
)
from rankflow.export.inspect import FACTS, WEIGHTS
from rankflow.export.peft import export_adapter
from rankflow.importance.sketch import GradientSketch
from rankflow.report.events import EventLog, read_events
from rankflow.report.summary import describe_event
from rankflow.report.tensorboard import TensorBoardSink
from rankflow.resizing import physical
from rankflow.specs.budget import BudgetSpec

STEPS = 40
TARGETS = ["first", "second", "third"]
# Parameters of a component: 6 + 8, 8 + 10 and 10 + 4; of the magnitudes: 8, 10 and 4.
COMPONENTS, MAGNITUDES = 14 + 18 + 14, 8 + 10 + 4

MOVES = {"rank": 2, "warmup": 4, "cooldown": 8, "every": 4, "decay": 0.5}
BUDGETS = {
    "reallocate": MOVES | {"recycle": 0.5, "hysteresis": 0.2, "protect": 1},
    "prune": MOVES | {"start": 1.75, "schedule": "cubic", "recycle": 0.0},
    "grow": MOVES | {"start": 0.5, "schedule": "linear", "recycle": 0.2, "protect": 0},
    "starve": MOVES | {"rank": 0.8, "start": 2.5, "schedule": "linear", "recycle": 0.4},
    "threshold": MOVES | {"policy": "threshold", "start": 1.5, "schedule": "cubic-late"},
    "proportional": MOVES | {"policy": "proportional", "recycle": 0.4},
    "uniform": MOVES | {"policy": "uniform", "start": 1.75, "schedule": "step", "stages": 3},
    "random": MOVES | {"policy": "random", "start": 1.75, "schedule": "linear"},
}
CHURN = {"every": 1, "recycle": 1.0, "score": "random", "hysteresis": 0.0, "protect": 0}
SCORES = ["frobenius", "norm", "sensitivity", "taylor", "fisher", "random", "uniform"]


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


def make_model(*, seed=0, adapter_name="default", **config):
    torch.manual_seed(seed)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | config
    return peft.get_peft_model(Net(), peft.LoraConfig(**config), adapter_name=adapter_name)


def make_optimizer(model, kind=torch.optim.AdamW, **settings):
    trainable = [p for p in model.parameters() if p.requires_grad]
    return kind(trainable, **({"lr": 0.02} | settings))


def start(budget, *, total_steps=STEPS, **config):
    """Build a model, an engine and an optimizer."""
    model = make_model(**config)
    spec = budget if isinstance(budget, BudgetSpec) else BudgetSpec(**budget)
    flow = RankFlow(model, spec, total_steps)
    return model, flow, make_optimizer(model)


def batch(step):
    """Draw the data of one step, whatever was drawn before."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 6, generator=generator)
    return x, (x[:, :3] * torch.tensor([1.0, -2.0, 0.5])).argmax(1)


def loss_of(model, step):
    x, y = batch(step)
    return functional.cross_entropy(model(x), y)


def take_step(model, flow, optimizer, step):
    loss_of(model, step).backward()
    flow.observe()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return flow.step(optimizer)


def train(model, flow, optimizer, *, first=0, last=STEPS):
    return [take_step(model, flow, optimizer, step) for step in range(first, last)]


def adapter_parameters(model, adapter_name="default"):
    """Find the trainable adapter parameters without asking RankFlow."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name and f".{adapter_name}" in name and parameter.requires_grad
    }


def recount(model, adapter_name="default"):
    return sum(p.numel() for p in adapter_parameters(model, adapter_name).values())


def untimed(history):
    return [replace(event, seconds=0.0) for event in history]


def ranks_in(model, adapter_name="default"):
    """Read every site's rank off the shapes of both of its factors."""
    ranks = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            A, B = module.lora_A[adapter_name].weight, module.lora_B[adapter_name].weight
            assert A.shape[0] == B.shape[1]
            ranks[name] = A.shape[0]
    return ranks


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other cost these tiny tensors twenty times their arithmetic."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# Construction


@pytest.mark.parametrize("r", [1, 2, 4])
def test_construction_resizes_every_site_evenly_whatever_rank_the_adapter_had(r):
    model = make_model(r=r, lora_alpha=2 * r)
    flow = RankFlow(model, BudgetSpec(rank=3), STEPS)
    assert flow.ranks == {"first": 3, "second": 3, "third": 3} == ranks_in(model)
    assert flow.spent == flow.limit == 3 * COMPONENTS == recount(model)


def test_magnitudes_count_within_the_budget(use_dora):
    model = make_model(use_dora=use_dora)
    flow = RankFlow(model, BudgetSpec(rank=2), STEPS)
    assert flow.limit == 2 * COMPONENTS
    assert flow.spent == recount(model) <= flow.limit
    components = sum(
        rank * cost for rank, cost in zip(flow.ranks.values(), (14, 18, 14), strict=True)
    )
    assert flow.spent == components + use_dora * MAGNITUDES
    assert flow.limit - flow.spent < 14


def test_construction_keeps_the_function(use_dora):
    model = make_model(use_dora=use_dora)
    x, _ = batch(0)
    before = model(x)
    RankFlow(model, BudgetSpec(rank=3), STEPS)
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("made", ["before", "after"])
def test_an_optimizer_made_before_or_after_the_engine_trains_the_very_next_step(made, use_dora):
    model = make_model(use_dora=use_dora)
    optimizer = make_optimizer(model)
    flow = RankFlow(model, BudgetSpec(**BUDGETS["reallocate"]), STEPS)
    if made == "after":
        optimizer = make_optimizer(model)
    before = copy.deepcopy(adapter_parameters(model))
    for step in range(2):  # B starts at zero, so A moves from the second step on
        take_step(model, flow, optimizer, step)
    assert all(not torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())


def test_a_model_under_rankflow_stays_a_stock_peft_model():
    model, flow, optimizer = start(BUDGETS["prune"])
    train(model, flow, optimizer)
    assert type(model) is peft.PeftModel
    assert model.peft_config["default"].peft_type == peft.PeftType.LORA
    with model.disable_adapter():
        assert torch.equal(model(batch(0)[0]), make_model().get_base_model()(batch(0)[0]))


# Invariants of every event


@pytest.mark.parametrize("name", BUDGETS)
def test_every_event_keeps_the_budget_the_scales_and_the_count(name, use_dora):
    model, flow, optimizer = start(BUDGETS[name], use_dora=use_dora)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    happened = 0
    for step in range(STEPS):
        event = take_step(model, flow, optimizer, step)
        assert flow.spent == recount(model)
        assert flow.ranks == ranks_in(model)
        assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in adapter_parameters(model).values()}
        if event is not None:
            happened += 1
            assert event.spent == flow.spent <= flow.limit == event.limit
            sites = find_sites(model)
            assert event.parameters == {site.name: site.parameters for site in sites}
            assert event.ranks == flow.ranks
    assert happened == len(flow.history) == 8
    assert flow.spent <= flow.limit == flow.resolved.target
    assert flow.finish() is None


@pytest.mark.parametrize("score", SCORES)
def test_every_score_steers_within_the_budget(score, use_dora):
    model, flow, optimizer = start(BUDGETS["starve"] | {"score": score}, use_dora=use_dora)
    train(model, flow, optimizer)
    assert flow.spent == recount(model) <= int(0.8 * COMPONENTS)
    assert flow.ranks == ranks_in(model)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.Adam, {"amsgrad": True}),
        (torch.optim.Adafactor, {}),
        (Adafactor, {"scale_parameter": False, "relative_step": False}),
    ],
)
def test_every_kind_of_optimizer_trains_through_the_events(kind, settings):
    model = make_model()
    flow = RankFlow(model, BudgetSpec(**BUDGETS["reallocate"]), STEPS)
    optimizer = make_optimizer(model, kind, **settings)
    before = loss_of(model, 0).item()
    train(model, flow, optimizer)
    assert any(event.born for event in flow.history)
    assert flow.spent == recount(model) <= flow.limit
    assert loss_of(model, 0).item() < before


def test_birth_does_not_change_the_function(use_dora):
    model, flow, optimizer = start(BUDGETS["grow"] | {"recycle": 0.0}, use_dora=use_dora)
    x, _ = batch(0)
    births = 0
    for step in range(STEPS):
        loss_of(model, step).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        before = model(x)
        event = flow.step(optimizer)
        if event is not None and event.born and not event.pruned:
            births += len(event.born)
            torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert births >= 3


def test_every_component_moves_in_the_two_steps_after_every_event(use_dora):
    model, flow, optimizer = start(BUDGETS["reallocate"], use_dora=use_dora)
    born, before = 0, {}
    for step in range(STEPS):
        if take_step(model, flow, optimizer, step) is not None:
            born += len(flow.history[-1].born)
            before = copy.deepcopy(adapter_parameters(model))
        elif flow.history and step == flow.history[-1].step + 1:  # B moves first, A by its help
            for name, parameter in adapter_parameters(model).items():
                new, old = (p.T if "lora_B" in name else p for p in (parameter, before[name]))
                assert (new != old).view(len(new), new[:1].numel()).any(dim=1).all(), name
    assert born > 0


def test_a_learning_rate_schedule_stays_bound_across_the_events():
    model, flow, optimizer = start(BUDGETS["reallocate"])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    for step in range(STEPS):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * (1 - step / STEPS))
        take_step(model, flow, optimizer, step)
        schedule.step()
    assert len(optimizer.param_groups) == 1


def test_survivors_keep_their_values_and_their_moments():
    model, flow, optimizer = start(BUDGETS["prune"])
    checked = 0
    for step in range(STEPS):
        loss_of(model, step).backward()
        flow.observe()
        optimizer.step()
        before = {
            name: (p.detach().clone(), optimizer.state[p]["exp_avg_sq"].clone())
            for name, p in adapter_parameters(model).items()
        }
        event = flow.step(optimizer)
        optimizer.zero_grad()
        if event is None:
            continue
        for name, p in adapter_parameters(model).items():
            site = name.split(".")[2]
            gone = {change.component for change in event.pruned if change.site == site}
            keep = [i for i in range(event.ranks_before[site]) if i not in gone]
            axis = 1 if "lora_B" in name else 0
            value, moment = (t.index_select(axis, torch.tensor(keep)) for t in before[name])
            assert torch.equal(p, value)
            assert torch.equal(optimizer.state[p]["exp_avg_sq"], moment)
            checked += len(gone)
    assert checked > 0


def test_a_dead_site_comes_back_to_life():
    model, flow, optimizer = start(
        BUDGETS["starve"] | {"score": "random", "hysteresis": 0.0, "protect": 0, "recycle": 1.0}
    )
    train(model, flow, optimizer)
    assert any(
        event.ranks_before[site] == 0 and rank > 0
        for event in flow.history
        for site, rank in event.ranks.items()
    )
    assert flow.spent == recount(model) <= flow.limit


@pytest.mark.parametrize(("protect", "all_live"), [(99, True), (0, False)])
def test_newborns_live_on_as_long_as_they_are_protected(protect, all_live):
    model, flow, optimizer = start(BUDGETS["reallocate"] | CHURN | {"protect": protect})
    train(model, flow, optimizer)
    born = [change.site for event in flow.history for change in event.born]
    assert born
    assert all(flow.ranks[site] >= born.count(site) for site in born) is all_live


# Events as a record


@pytest.mark.parametrize("name", ["reallocate", "prune", "grow"])
def test_the_history_tells_the_whole_run_in_order(name):
    model, flow, optimizer = start(BUDGETS[name])
    seen = []
    flow.sinks.append(seen.append)
    first = flow.ranks
    returned = [event for event in train(model, flow, optimizer) if event is not None]
    assert flow.history == seen == returned
    assert [event.index for event in flow.history] == list(range(8))
    assert [event.step for event in flow.history] == [4, 8, 12, 16, 20, 24, 28, 32]
    for event in flow.history:
        assert event.ranks_before == first
        change = dict.fromkeys(first, 0)
        for component in event.born:
            change[component.site] += 1
        for component in event.pruned:
            change[component.site] -= 1
        assert event.ranks == {site: first[site] + change[site] for site in first}
        assert event.seconds > 0
        first = event.ranks
    assert flow.ranks == first
    changes = [change for event in flow.history for change in event.pruned + event.born]
    assert changes
    assert all(change.reason for change in changes)


def test_pruning_under_a_falling_budget_gives_that_as_the_reason():
    model, flow, optimizer = start(BUDGETS["prune"])
    train(model, flow, optimizer)
    assert {c.reason for event in flow.history for c in event.pruned} == {"the budget fell"}


def test_pruning_under_a_constant_budget_names_the_better_site():
    model, flow, optimizer = start(BUDGETS["reallocate"])
    train(model, flow, optimizer)
    reasons = {c.reason for event in flow.history for c in event.pruned}
    assert reasons == {"another site promises more"}


@pytest.mark.parametrize("name", ["reallocate", "prune"])
def test_the_same_run_twice_gives_identical_events_and_parameters(name, use_dora):
    runs = []
    for _ in range(2):
        model, flow, optimizer = start(BUDGETS[name], use_dora=use_dora)
        train(model, flow, optimizer)
        runs.append((untimed(flow.history), adapter_parameters(model)))
    assert runs[0][0] == runs[1][0]
    for parameter, other in zip(runs[0][1].values(), runs[1][1].values(), strict=True):
        assert torch.equal(parameter, other)


def test_another_seed_gives_newborns_other_directions():
    rows = []
    for seed in (0, 1):
        model, flow, optimizer = start(BUDGETS["grow"] | {"seed": seed})
        event = next(
            e for e in (take_step(model, flow, optimizer, s) for s in range(STEPS)) if e and e.born
        )
        born = event.born[0]
        A = model.get_base_model().get_submodule(born.site).lora_A["default"].weight
        rows.append((born.site, A[born.component].tolist()))
    assert rows[0][0] == rows[1][0]
    assert rows[0][1] != rows[1][1]


# Steps


def test_stepping_before_zero_grad_decides_the_same():
    histories = []
    for zero_first in (True, False):
        model, flow, optimizer = start(BUDGETS["reallocate"])
        for step in range(STEPS):
            loss_of(model, step).backward()
            flow.observe()
            optimizer.step()
            if zero_first:
                optimizer.zero_grad()
            flow.step(optimizer)
            if not zero_first:
                optimizer.zero_grad()
        histories.append(untimed(flow.history))
    assert histories[0] == histories[1]


def test_accumulated_and_clipped_gradients_decide_like_the_whole_batch():
    histories = []
    for parts in (1, 4):
        model, flow, optimizer = start(BUDGETS["prune"])
        for step in range(STEPS):
            x, y = batch(step)
            for xs, ys in zip(x.chunk(parts), y.chunk(parts), strict=True):
                (functional.cross_entropy(model(xs), ys) / parts).backward()
            if parts > 1:
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            flow.observe()
            optimizer.step()
            optimizer.zero_grad()
            flow.step(optimizer)
        histories.append(flow.history)
    for whole, accumulated in zip(*histories, strict=True):
        assert accumulated.ranks == whole.ranks
        # Gradients are summed in another order; Adam turns that into about 1e-4 in 40 steps.
        assert accumulated.importance == pytest.approx(whole.importance, rel=1e-2)


def test_clipping_does_not_change_the_scores():
    scores = []
    for clip in (False, True):
        model, flow, optimizer = start(BUDGETS["prune"])
        loss_of(model, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        loss_of(model, 1).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        flow.observe()
        scores.append(flow.state_dict()["scorer"]["components.sum"])
    assert scores[0].abs().max() > 0
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=0)


def test_a_step_whose_gradients_are_not_finite_does_not_count():
    model, flow, optimizer = start(BUDGETS["prune"])
    for step in range(2):
        take_step(model, flow, optimizer, step)
    before = flow.state_dict()["scorer"]
    loss_of(model, 2).backward()
    next(iter(adapter_parameters(model).values())).grad[0, 0] = float("nan")
    flow.observe()
    after = flow.state_dict()["scorer"]
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_training_under_bf16_autocast_keeps_the_budget(use_dora):
    model, flow, optimizer = start(BUDGETS["reallocate"], use_dora=use_dora)
    before = loss_of(model, 0).item()
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, step)
        loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        flow.step(optimizer)
    assert flow.spent == recount(model) <= flow.limit
    assert any(event.born for event in flow.history)
    assert loss_of(model, 0).item() < before


def test_a_static_budget_needs_neither_observations_nor_events():
    _, flow, optimizer = start({"rank": 2, "policy": "uniform"})
    assert [flow.step(optimizer) for _ in range(STEPS)] == [None] * STEPS
    assert flow.history == []
    assert flow.finish() is None


def test_an_event_without_observation_is_refused_with_the_remedy():
    model, flow, optimizer = start(BUDGETS["prune"])
    for _ in range(3):
        assert flow.step(optimizer) is None
    with pytest.raises(
        RankFlowError, match=r"after step 4, but observe\(\) saw no gradients; call"
    ):
        flow.step(optimizer)
    assert flow.ranks == ranks_in(model)
    assert flow.history == []


def test_observing_without_gradients_is_refused_with_the_remedy():
    model, flow, optimizer = start(BUDGETS["prune"])
    with pytest.raises(RankFlowError, match=r"no gradient on any adapter parameter; call it after"):
        flow.observe()
    loss_of(model, 0).backward()
    optimizer.zero_grad()
    with pytest.raises(RankFlowError, match="no gradient on any adapter parameter"):
        flow.observe()


def test_an_optimizer_of_other_parameters_is_refused():
    _, flow, _ = start(BUDGETS["prune"])
    stranger = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(SurgeryError, match="does not train the adapter of site 'first'"):
        flow.step(stranger)
    assert flow.steps == 0


def test_a_closed_engine_watches_no_gradients():
    model, flow, _ = start(BUDGETS["prune"])
    assert any(p._post_accumulate_grad_hooks for p in adapter_parameters(model).values())
    flow.close()
    assert not any(p._post_accumulate_grad_hooks for p in adapter_parameters(model).values())


# The end


@pytest.mark.parametrize("stopped", [0, 2, 5, 13])
def test_finishing_early_meets_the_budget(stopped, use_dora):
    model, flow, optimizer = start(BUDGETS["prune"], use_dora=use_dora)
    train(model, flow, optimizer, last=stopped)
    assert flow.spent > flow.resolved.target
    event = flow.finish()
    assert event is flow.history[-1]
    assert event.step == stopped
    assert flow.spent == event.spent == recount(model) <= flow.limit == flow.resolved.target
    assert event.pruned
    assert not event.born
    assert flow.finish() is None


def test_finishing_below_the_target_changes_nothing():
    model, flow, optimizer = start(BUDGETS["grow"])
    train(model, flow, optimizer, last=6)
    ranks = flow.ranks
    assert flow.finish() is None
    assert flow.ranks == ranks
    assert flow.spent <= flow.limit <= flow.resolved.target


def test_the_facts_describe_the_run():
    model, flow, optimizer = start(BUDGETS["prune"])
    train(model, flow, optimizer)
    facts = flow.facts({"accuracy": 0.5})
    assert (facts.spent, facts.target, facts.steps) == (recount(model), 2 * COMPONENTS, STEPS)
    assert facts.budget["policy"] == "knapsack"
    assert facts.metrics == {"accuracy": 0.5}


# What is refused before training


def test_a_budget_that_is_no_spec_is_refused():
    with pytest.raises(SpecError, match=r"must be a BudgetSpec, received str; use .*load_budget"):
        RankFlow(make_model(), "reallocate", STEPS)


@pytest.mark.parametrize("steps", [0, -3, 10.0, "10", None])
def test_a_length_that_is_no_positive_number_of_steps_is_refused(steps):
    with pytest.raises(BudgetError, match="total_steps must be a positive whole number"):
        RankFlow(make_model(), BudgetSpec(rank=2), steps)


def test_a_model_without_adapter_is_refused():
    with pytest.raises(SiteError, match=r"received Net; call peft.get_peft_model"):
        RankFlow(Net(), BudgetSpec(rank=2), STEPS)


def test_an_unknown_adapter_is_refused_with_those_that_exist():
    with pytest.raises(SiteError, match=r"no adapter 'other'; it has \['default'\]"):
        RankFlow(make_model(), BudgetSpec(rank=2), STEPS, "other")


def test_a_frozen_adapter_is_refused():
    model = make_model()
    model.requires_grad_(False)
    with pytest.raises(SiteError, match=r"3 of 3 sites of adapter 'default' are frozen"):
        RankFlow(model, BudgetSpec(rank=2), STEPS)


def test_an_inactive_adapter_is_refused_with_the_remedy():
    model = make_model()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    with pytest.raises(SiteError, match=r"model.set_adapter\('second'\)"):
        RankFlow(model, BudgetSpec(rank=2), STEPS, "second")


@pytest.mark.parametrize("act", ["step", "finish", "load"])
def test_an_adapter_that_is_inactive_when_ranks_move_is_refused_before_they_do(act):
    model, flow, optimizer = start(BUDGETS["prune"])
    saved = flow.state_dict()
    train(model, flow, optimizer, last=7)
    loss_of(model, 7).backward()
    flow.observe()
    optimizer.step()
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("second")
    before = (flow.ranks, flow.limit, len(flow.history))
    deeds = {
        "step": lambda: flow.step(optimizer),
        "finish": flow.finish,
        "load": lambda: flow.load_state_dict(saved),
    }
    with pytest.raises(SiteError, match=r"are frozen.*model.set_adapter\('default'\)"):
        deeds[act]()
    assert (flow.ranks, flow.limit, len(flow.history)) == before
    assert ranks_in(model) == flow.ranks


def test_an_initialisation_that_moves_the_base_weight_is_refused():
    model = make_model(init_lora_weights="pissa")
    with pytest.raises(SiteError, match="init_lora_weights='pissa', which moves part of the base"):
        RankFlow(model, BudgetSpec(rank=2), STEPS)


def test_an_infeasible_budget_leaves_the_model_as_it_was():
    model = make_model()
    with pytest.raises(BudgetError, match="at most"):
        RankFlow(model, BudgetSpec(rank=50), STEPS)
    assert ranks_in(model) == {"first": 4, "second": 4, "third": 4}


# What comes in between


def everything(model, flow, optimizer):
    return copy.deepcopy((model.state_dict(), flow.state_dict(), optimizer.state_dict()))


def assert_same(one, other):
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert_same(value, other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_same(*pair)
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def until_event(budget="reallocate", **config):
    """Train to the step after which the first event is due, that step included."""
    model, flow, optimizer = start(BUDGETS[budget], **config)
    train(model, flow, optimizer, last=3)
    loss_of(model, 3).backward()
    flow.observe()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return model, flow, optimizer


def fail_once(monkeypatch, error):
    """Let the last part of the next event raise an error, once."""
    original, errors = physical.sync_config, [error]

    def sync(*arguments):
        if errors:
            raise errors.pop()
        original(*arguments)

    monkeypatch.setattr(physical, "sync_config", sync)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("64 GiB"), MemoryError("64 GiB"), RuntimeError("64 GiB")]
)
def test_an_event_without_memory_is_undone_and_tried_again_at_the_next_due_step(error, monkeypatch):
    model, flow, optimizer = until_event()
    before = everything(model, flow, optimizer)
    fail_once(monkeypatch, error)
    with pytest.raises(SurgeryError, match=r"after step 4 failed, .* 64 GiB; if memory") as caught:
        flow.step(optimizer)
    assert caught.value.__cause__ is error
    before[1]["steps"] = 4
    assert_same(everything(model, flow, optimizer), before)
    train(model, flow, optimizer, first=4)
    assert [event.step for event in flow.history[:2]] == [8, 12]
    assert flow.history[0].index == 0
    assert flow.spent <= flow.limit


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, AssertionError])
def test_an_interruption_passes_as_it_is_and_leaves_everything_as_it_was(error, monkeypatch):
    model, flow, optimizer = until_event()
    before = everything(model, flow, optimizer)
    fail_once(monkeypatch, error)
    with pytest.raises(error):
        flow.step(optimizer)
    before[1]["steps"] = 4
    assert_same(everything(model, flow, optimizer), before)


def test_what_a_sink_raises_reaches_the_caller_and_the_event_stands():
    model, flow, optimizer = until_event()
    twin = until_event()
    twin[1].step(twin[2])

    def full(event):
        raise OSError("no space left on the device")

    flow.sinks.append(full)
    with pytest.raises(OSError, match="no space left"):
        flow.step(optimizer)
    assert untimed(flow.history) == untimed(twin[1].history)
    assert len(flow.history) == 1
    flow.sinks.clear()
    for run in ((model, flow, optimizer), twin):
        train(*run, first=4)
    assert untimed(flow.history) == untimed(twin[1].history)
    assert_same(model.state_dict(), twin[0].state_dict())


def test_without_memory_for_a_sketch_the_event_before_it_is_told_all_the_same(monkeypatch):
    model, flow, optimizer = until_event()
    told = []
    flow.sinks.append(told.append)

    def no_room(self, event):
        raise torch.OutOfMemoryError("64 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(GradientSketch, "_allocate", no_room)
        with pytest.raises(SurgeryError, match="sketching the gradient for newborns failed"):
            flow.step(optimizer)
    assert told == flow.history
    assert len(told) == 1
    train(model, flow, optimizer, first=4)
    assert told == flow.history


def test_nothing_is_decided_on_weights_that_are_not_finite(use_dora):
    model, flow, optimizer = until_event(use_dora=use_dora)
    name, parameter = next(iter(adapter_parameters(model).items()))
    with torch.no_grad():
        parameter[0, 0] = float("nan")
    ranks = flow.ranks
    with pytest.raises(DivergenceError, match=r"weights of site 'first' are not .* by step 4: go"):
        flow.step(optimizer)
    with pytest.raises(DivergenceError, match="site 'first'"):
        flow.finish()
    assert flow.ranks == ranks
    assert flow.history == []
    assert dict(model.named_parameters())[name] is parameter


def test_nothing_is_decided_on_scores_that_are_not_finite():
    model, flow, optimizer = until_event()
    state = flow.state_dict()
    state["scorer"]["components.sum"][5] = float("inf")
    flow.load_state_dict(state)
    before = everything(model, flow, optimizer)
    with pytest.raises(DivergenceError, match="1 of 6 scores are not finite, the first at site"):
        flow.step(optimizer)
    before[1]["steps"] = 4
    assert_same(everything(model, flow, optimizer), before)


def test_the_count_of_bad_steps_goes_into_the_state():
    model, flow, optimizer = start(BUDGETS["reallocate"])
    for step in range(3):
        (loss_of(model, step) * float("nan")).backward()
        flow.observe()
        flow.mute_bad_step()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    state = flow.state_dict()
    assert state["bad_steps"] == 3
    other = make_model()
    resumed = RankFlow(other, flow.budget, STEPS, resume=state, max_bad_steps=4)
    (loss_of(other, 3) * float("nan")).backward()
    with pytest.raises(DivergenceError, match=r"4 steps in a row .* the first is step 1:"):
        resumed.observe()


@pytest.mark.parametrize("policy", ["knapsack", "uniform"])
def test_a_muted_step_is_one_of_zero_gradient_under_every_budget(policy):
    model, flow, optimizer = start(MOVES | {"policy": policy})
    twin = start(MOVES | {"policy": policy})
    for each, number in ((model, float("nan")), (twin[0], 0.0)):
        (loss_of(each, 0) * number).backward()
    flow.observe()
    flow.mute_bad_step()
    for each, step in ((model, optimizer), (twin[0], twin[2])):
        assert all(not p.grad.any() for p in each.parameters() if p.grad is not None)
        step.step()
    assert_same(model.state_dict(), twin[0].state_dict())


@pytest.mark.parametrize("limit", [0, -1, 2.5, None])
def test_a_limit_of_bad_steps_that_is_no_number_of_steps_is_refused(limit):
    with pytest.raises(RankFlowError, match="max_bad_steps must be a positive whole number"):
        RankFlow(make_model(), BudgetSpec(rank=2), STEPS, max_bad_steps=limit)


# Modules that a step does not reach


class Routed(nn.Module):
    """Six experts, of which a step reaches two, and the last of all never."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(6))

    def forward(self, x, step):
        return self.experts[step % 5](x) + self.experts[(step + 1) % 5](x)


def train_routed(score, *, fills, use_dora):
    """Train; with ``fills``, experts without a token show zeros to ``observe`` instead of None."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, use_dora=use_dora, target_modules=r"experts\.\d")
    model = peft.get_peft_model(Routed(), config)
    spec = BudgetSpec(**BUDGETS["reallocate"] | {"score": score, "grow_steps": 3, "decay": 0.9})
    flow, optimizer = RankFlow(model, spec, STEPS), make_optimizer(model)
    missed = 0
    for step in range(STEPS):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(step))
        (model(x, step) - x.roll(1, dims=1)).square().mean().backward()
        without = [p for p in model.parameters() if p.requires_grad and p.grad is None]
        missed += len(without)
        for parameter in without if fills else ():
            parameter.grad = torch.zeros_like(parameter)
        flow.observe()
        for parameter in without:
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
    assert missed > 6 * STEPS
    assert all(torch.isfinite(p).all() for p in model.parameters())
    return flow


@pytest.mark.parametrize("score", ["taylor", "fisher", "sensitivity"])
def test_an_expert_without_a_token_counts_as_one_whose_gradient_is_zero(score, use_dora):
    flow = train_routed(score, fills=False, use_dora=use_dora)
    other = train_routed(score, fills=True, use_dora=use_dora)
    assert untimed(flow.history) == untimed(other.history)
    assert any(event.born for event in flow.history)
    assert flow.ranks["experts.5"] == 0


# Several adapters and other trained parts


def test_other_adapters_stay_untouched(use_dora):
    model = make_model(use_dora=use_dora)
    model.add_adapter("second", peft.LoraConfig(r=3, target_modules=["first", "head"]))
    for name, parameter in model.named_parameters():
        if ".second" in name:
            parameter.data = torch.randn_like(parameter)
    others = {n: p for n, p in model.named_parameters() if ".default" not in n}
    before = copy.deepcopy(others)
    flow = RankFlow(model, BudgetSpec(**BUDGETS["starve"]), STEPS)
    train(model, flow, make_optimizer(model))
    after = {n: p for n, p in model.named_parameters() if ".default" not in n}
    assert after.keys() == before.keys()
    assert all(after[name] is others[name] for name in others)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.peft_config["second"].r == 3
    assert not model.peft_config["second"].rank_pattern


def test_the_adapter_that_is_named_is_steered():
    model = make_model(adapter_name="steered")
    flow = RankFlow(model, BudgetSpec(**BUDGETS["prune"]), STEPS, "steered")
    train(model, flow, make_optimizer(model))
    assert flow.ranks == ranks_in(model, "steered")
    assert flow.spent == recount(model, "steered") <= 2 * COMPONENTS


def test_a_trained_head_is_trained_and_not_counted():
    model, flow, optimizer = start(BUDGETS["prune"], modules_to_save=["head"])
    head = {n: p for n, p in model.named_parameters() if "modules_to_save" in n}
    before = copy.deepcopy(head)
    train(model, flow, optimizer)
    assert flow.spent == recount(model) <= 2 * COMPONENTS
    assert head
    assert all(p.requires_grad and not torch.equal(p, before[n]) for n, p in head.items())


def test_a_fraction_is_of_the_base_model_without_adapter_and_trained_head():
    base = sum(p.numel() for p in Net().parameters())
    model = make_model(modules_to_save=["head"], use_dora=True)
    flow = RankFlow(model, BudgetSpec(fraction=0.3), STEPS)
    assert flow.limit == int(0.3 * base)


def test_bytes_follow_the_type_of_the_adapter():
    for dtype, width in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = make_model()
        for parameter in adapter_parameters(model).values():
            parameter.data = parameter.data.to(dtype)
        flow = RankFlow(model, BudgetSpec(bytes=480), STEPS)
        assert flow.limit == 480 // width
        held = adapter_parameters(model).values()
        assert {p.dtype for p in held} == {dtype}
        assert sum(p.numel() * p.element_size() for p in held) <= 480


# Kill and resume


def resume(folder, saved, budget, **config):
    """Build everything anew, as in another process, and restore what was saved."""
    model = make_model(seed=9, **config)
    flow = RankFlow(model, BudgetSpec(**budget), STEPS, resume=load_state(folder))
    model.load_state_dict(saved["model"])
    optimizer = make_optimizer(model)
    optimizer.load_state_dict(saved["optimizer"])
    flow.attach(optimizer)
    return model, flow, optimizer


def save(folder, model, flow, optimizer):
    save_state(flow.state_dict(), folder)
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def check_resumed_run(folder, budget, stopped, **config):
    model, flow, optimizer = start(budget, **config)
    train(model, flow, optimizer, last=stopped)
    saved = save(folder, model, flow, optimizer)
    train(model, flow, optimizer, first=stopped)
    resumed, resumed_flow, resumed_optimizer = resume(folder, saved, budget, **config)
    assert resumed_flow.steps == stopped
    train(resumed, resumed_flow, resumed_optimizer, first=stopped)
    assert untimed(resumed_flow.history) == untimed(flow.history)
    assert resumed_flow.limit == flow.limit
    expected = adapter_parameters(model)
    actual = adapter_parameters(resumed)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    return flow


@pytest.mark.parametrize("stopped", [0, 3, 4, 5, 9, 22, 33])
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(stopped, tmp_path, use_dora):
    flow = check_resumed_run(tmp_path, BUDGETS["reallocate"], stopped, use_dora=use_dora)
    assert any(event.born for event in flow.history)


@pytest.mark.parametrize("score", SCORES)
def test_a_run_of_every_score_resumes_bit_for_bit(score, tmp_path):
    check_resumed_run(tmp_path, BUDGETS["reallocate"] | {"score": score}, 14)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_run_of_every_budget_resumes_bit_for_bit(name, tmp_path):
    check_resumed_run(tmp_path, BUDGETS[name], 18)


def test_a_run_with_dead_sites_resumes_bit_for_bit(tmp_path, use_dora):
    budget = BUDGETS["starve"] | {"rank": 0.5, "start": 1.0, "schedule": "constant"}
    if use_dora:
        budget["rank"] = 0.9
    flow = check_resumed_run(tmp_path, budget, 18, use_dora=use_dora)
    assert 0 in flow.history[2].ranks.values()


def test_young_components_stay_young_through_a_resume(tmp_path):
    model, flow, optimizer = start(BUDGETS["reallocate"])
    train(model, flow, optimizer, last=17)
    assert flow.history[-1].born
    assert flow.history[-1].step == 16
    saved = save(tmp_path, model, flow, optimizer)
    young = flow.state_dict()["young"]
    assert any(1 in steps for steps in young)
    _, resumed, _ = resume(tmp_path, saved, BUDGETS["reallocate"])
    assert resumed.state_dict()["young"] == young


def test_a_running_engine_can_be_set_back(use_dora):
    model, flow, optimizer = start(BUDGETS["reallocate"], use_dora=use_dora)
    train(model, flow, optimizer, last=18)
    state, saved = flow.state_dict(), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, flow, optimizer, first=18)
    history, parameters = untimed(flow.history), copy.deepcopy(adapter_parameters(model))
    flow.load_state_dict(state)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, flow, optimizer, first=18)
    assert untimed(flow.history) == history
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, parameters[name])


def test_a_state_holds_no_reference_to_the_living_engine():
    model, flow, optimizer = start(BUDGETS["reallocate"])
    train(model, flow, optimizer, last=10)
    state = flow.state_dict()
    before = copy.deepcopy(state)
    train(model, flow, optimizer, first=10)
    for part in ("scorer", "sketch"):
        tensors, expected = state.pop(part), before.pop(part)
        assert expected
        assert all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert state == before


@pytest.mark.parametrize(
    ("changes", "length", "targets", "message"),
    [
        ({"rank": 3}, STEPS, TARGETS, "other budget than this run"),
        ({}, STEPS + 1, TARGETS, "other total_steps than this run: 40 instead of 41"),
        ({}, STEPS, ["first", "second"], r"other sites than this run: .*'third'\] instead of"),
    ],
)
def test_a_state_of_another_run_is_refused(changes, length, targets, message, tmp_path):
    _, flow, _ = start(BUDGETS["prune"])
    save_state(flow.state_dict(), tmp_path)
    model = make_model(target_modules=targets)
    with pytest.raises(CheckpointError, match=message):
        RankFlow(
            model, BudgetSpec(**BUDGETS["prune"] | changes), length, resume=load_state(tmp_path)
        )
    assert set(ranks_in(model).values()) == {4}


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_an_optimizer_that_trained_at_other_ranks_is_refused_before_it_steps(settings):
    model, flow, optimizer = start(BUDGETS["prune"])
    train(model, flow, optimizer, last=10)
    assert flow.ranks["second"] == 2
    fresh = make_model()
    untrained = RankFlow(fresh, BudgetSpec(rank=3), STEPS)
    other = make_optimizer(fresh, **settings)
    other.load_state_dict(optimizer.state_dict())
    with pytest.raises(SurgeryError, match=r"has trained site '[a-z]+' at another rank: its state"):
        untrained.attach(other)


# Magnitudes under the budget

BUDGETED = {name: budget | {"magnitude": "budgeted"} for name, budget in BUDGETS.items()}
MAGNITUDE_SCORES = [score for score in SCORES if score != "frobenius"] + ["tangential"]
# Small enough that magnitudes and components compete, on the mixed model.
TIGHT = MOVES | {
    "rank": 1.2,
    "magnitude": "budgeted",
    "recycle": 0.5,
    "hysteresis": 0.0,
    "protect": 0,
}
# These end with every combination of components and magnitude.
ALL_FOUR = TIGHT | {"rank": 0.7, "score": "norm", "policy": "threshold"}
MIXED_MAGNITUDES = {"embed": 6, "fan": 5, "first": 5, "second": 4, "conv": 4}


def start_mixed(mixed, budget, *, total_steps=STEPS):
    """Steer the model of all kinds of layers, with DoRA and in float64."""
    torch.manual_seed(0)
    model = mixed(use_dora=True, trained=False).double()
    flow = RankFlow(model, BudgetSpec(**budget), total_steps)
    return model, flow, make_optimizer(model, lr=0.05)


def mixed_tokens(step):
    return torch.randint(11, (8, 4), generator=torch.Generator().manual_seed(step))


def train_mixed(model, flow, optimizer, *, first=0, last=STEPS):
    """Train, and check the count after every step."""
    for step in range(first, last):
        tokens = mixed_tokens(step)
        target = torch.tanh(tokens.double().sum(1, keepdim=True) - 20 + torch.arange(40))
        (model(tokens) - target).square().mean().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        event = flow.step(optimizer)
        assert flow.spent == recount(model)
        if event is not None:
            assert event.spent == flow.spent <= flow.limit == event.limit
            assert event.magnitudes == magnitudes_in(model)
            assert event.ranks == flow.ranks


def magnitudes_in(model):
    """Read which sites train a magnitude off the trainable parameters."""
    return {
        name: module.lora_magnitude_vector["default"].weight.numel() > 0
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def read_stock(model, folder):
    """Load an exported adapter by stock PEFT onto a fresh copy of the base model."""
    base = copy.deepcopy(model).unload()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("policy", ["knapsack", "knapsack-exact", "threshold", "proportional"])
@pytest.mark.parametrize("score", MAGNITUDE_SCORES)
def test_a_budgeted_run_keeps_the_budget_and_exports_exactly(score, policy, mixed, tmp_path):
    model, flow, optimizer = start_mixed(mixed, TIGHT | {"score": score, "policy": policy})
    train_mixed(model, flow, optimizer)
    assert len(flow.history) == 8
    assert flow.spent <= flow.limit == flow.resolved.target == int(1.2 * 64)
    folder = export_adapter(model, tmp_path / "adapter", facts=flow.facts())
    tokens = mixed_tokens(99)
    stock = read_stock(model, folder)
    torch.testing.assert_close(stock(tokens), model(tokens), rtol=1e-12, atol=1e-12)


def test_all_four_end_states_are_reached_and_exported_exactly(mixed, tmp_path):
    model, flow, optimizer = start_mixed(mixed, ALL_FOUR)
    train_mixed(model, flow, optimizer)
    on = magnitudes_in(model)
    assert {(rank > 0, on[site]) for site, rank in flow.ranks.items()} == {
        (True, True),
        (True, False),
        (False, True),
        (False, False),
    }
    pruned = [c for event in flow.history for c in event.pruned if c.component is None]
    born = [c for event in flow.history for c in event.born if c.component is None]
    assert pruned
    assert born
    folder = export_adapter(model, tmp_path / "adapter", facts=flow.facts())
    stock = read_stock(model, folder)
    tokens = mixed_tokens(99)
    torch.testing.assert_close(stock(tokens), model(tokens), rtol=1e-12, atol=1e-12)
    own = json.loads((folder / FACTS).read_text())
    assert own["trained_parameters"] == own["run"]["spent"] == flow.spent == recount(model)
    assert own["stored_parameters"] > own["trained_parameters"]


@pytest.mark.parametrize("name", BUDGETED)
def test_every_budget_covers_magnitudes(name):
    model, flow, optimizer = start(BUDGETED[name], use_dora=True)
    for step in range(STEPS):
        event = take_step(model, flow, optimizer, step)
        assert flow.spent == recount(model)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        assert held == {id(p) for p in adapter_parameters(model).values()}
        assert event is None or event.spent == flow.spent <= flow.limit == event.limit
    assert len(flow.history) == 8
    assert flow.spent <= flow.resolved.target
    assert flow.finish() is None


def test_the_history_tells_what_became_of_every_magnitude(mixed):
    model, flow, optimizer = start_mixed(mixed, ALL_FOUR)
    on = magnitudes_in(model)
    train_mixed(model, flow, optimizer)
    for event in flow.history:
        for change in event.born:
            if change.component is None:
                assert on[change.site] is False
                on[change.site] = True
        for change in event.pruned:
            if change.component is None:
                assert on[change.site] is True
                on[change.site] = False
        assert event.magnitudes == on
        cost = sum(MIXED_MAGNITUDES[site] for site, is_on in on.items() if is_on)
        costs = dict(zip(on, (18, 11, 10, 9, 16), strict=True))
        assert event.spent == cost + sum(costs[s] * r for s, r in event.ranks.items())


def test_finishing_early_turns_magnitudes_off_where_the_budget_needs_it(mixed):
    budget = TIGHT | {"start": 1.9, "schedule": "cubic", "rank": 0.7}
    model, flow, optimizer = start_mixed(mixed, budget)
    train_mixed(model, flow, optimizer, last=5)
    assert flow.spent > flow.resolved.target
    event = flow.finish()
    assert flow.spent == event.spent == recount(model) <= flow.limit == flow.resolved.target


def test_never_trains_no_magnitude_and_exports_plain_lora(mixed, tmp_path):
    model, flow, optimizer = start_mixed(mixed, TIGHT | {"magnitude": "never"})
    assert not any(magnitudes_in(model).values())
    for step in range(STEPS):
        tokens = mixed_tokens(step)
        model(tokens).square().mean().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        assert flow.spent == recount(model) <= flow.limit
    assert flow.history
    assert all(event.magnitudes == {} for event in flow.history)
    assert not any(magnitudes_in(model).values())
    folder = export_adapter(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] is False
    assert not any("magnitude" in key for key in load_file(folder / WEIGHTS))
    tokens = mixed_tokens(99)
    stock = read_stock(model, folder)
    torch.testing.assert_close(stock(tokens), model(tokens), rtol=1e-12, atol=1e-12)


def test_never_decides_like_plain_lora():
    runs = []
    for config in ({"use_dora": True}, {"use_dora": False}):
        budget = BUDGETS["reallocate"] | {"magnitude": "never"}
        model, flow, optimizer = start(budget, **config)
        train(model, flow, optimizer)
        runs.append((untimed(flow.history), recount(model), loss_of(model, 99)))
    assert runs[0][0] == runs[1][0]
    assert runs[0][1:] == runs[1][1:]


@pytest.mark.parametrize("magnitude", ["always", "never"])
def test_magnitudes_of_plain_lora_can_be_left_out_of_the_budget(magnitude):
    _, flow, _ = start(BUDGETS["prune"] | {"magnitude": magnitude})
    assert flow.spent <= flow.limit


def test_budgeted_magnitudes_of_plain_lora_are_refused_with_the_remedy():
    model = make_model()
    with pytest.raises(BudgetError, match=r"has none; make it with LoraConfig\(use_dora=True\)"):
        RankFlow(model, BudgetSpec(**BUDGETED["prune"]), STEPS)
    assert set(ranks_in(model).values()) == {4}


@pytest.mark.parametrize(
    ("ranks", "magnitudes"),
    [
        ({".*": 1}, [True, True, True]),
        ({"first": 2, "second": 1, "third": 1, "first.magnitude": 0}, [False, True, True]),
        ({"first|second|third": 1, r".*\.magnitude": 0}, [False, False, False]),
        ({".*magnitude": 0, "third.magnitude": 1, ".*": 1}, [False, False, False]),
        ({"third.magnitude": 1, ".*magnitude": 0, ".*": 1}, [False, False, True]),
    ],
)
def test_frozen_magnitudes_stay_on_unless_a_pattern_turns_them_off(ranks, magnitudes):
    budget = {"rank": 3, "policy": "frozen", "magnitude": "budgeted", "ranks": ranks}
    model, flow, optimizer = start(budget, use_dora=True)
    train(model, flow, optimizer, last=3)
    assert list(magnitudes_in(model).values()) == magnitudes
    assert flow.ranks["second"] == 1
    assert flow.spent == recount(model)


@pytest.mark.parametrize(
    ("ranks", "magnitude", "message"),
    [
        ({".*": 1, "first.magnitude": 2}, "budgeted", r"first.magnitude rank 2.*between 0 and 1"),
        ({".*": 1, "fourth.magnitude": 0}, "budgeted", r"'fourth.magnitude' in ranks matches none"),
        ({".*": 1, "first.magnitude": 0}, "always", r"'first.magnitude' in ranks matches none"),
        ({"first.magnitude": 0}, "budgeted", r"say nothing of site 'first'"),
    ],
)
def test_frozen_magnitudes_that_make_no_sense_are_refused(ranks, magnitude, message):
    budget = {"rank": 3, "policy": "frozen", "magnitude": magnitude, "ranks": ranks}
    with pytest.raises(BudgetError, match=message):
        start(budget, use_dora=True)


def test_the_function_moves_by_nothing_where_magnitudes_come_back_and_nothing_goes():
    budget = BUDGETED["grow"] | {"recycle": 0.0, "rank": 1.5, "start": 0.3, "score": "random"}
    model, flow, optimizer = start(budget, use_dora=True)
    x, _ = batch(0)
    for step in range(STEPS):
        loss_of(model, step).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        before = model(x)
        event = flow.step(optimizer)
        if event is not None and not event.pruned:
            torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert any(event.born for event in flow.history)


@pytest.mark.parametrize("stopped", [0, 3, 4, 9, 22, 33])
@pytest.mark.parametrize("name", ["reallocate", "starve"])
def test_a_budgeted_run_resumes_bit_for_bit(name, stopped, tmp_path):
    flow = check_resumed_run(tmp_path, BUDGETED[name], stopped, use_dora=True)
    assert any(event.born for event in flow.history)


@pytest.mark.parametrize("score", MAGNITUDE_SCORES)
def test_a_budgeted_run_of_every_score_resumes_bit_for_bit(score, tmp_path):
    budget = BUDGETED["reallocate"] | CHURN | {"rank": 1, "score": score, "policy": "threshold"}
    flow = check_resumed_run(tmp_path, budget, 14, use_dora=True)
    changes = [c for event in flow.history for c in event.pruned + event.born]
    assert any(change.component is None for change in changes)


@pytest.mark.parametrize("stopped", [1, 4, 13, 30])
def test_a_run_on_every_kind_of_layer_resumes_with_the_same_magnitudes(stopped, mixed, tmp_path):
    model, flow, optimizer = start_mixed(mixed, ALL_FOUR)
    train_mixed(model, flow, optimizer, last=stopped)
    saved = save(tmp_path, model, flow, optimizer)
    train_mixed(model, flow, optimizer, first=stopped)
    torch.manual_seed(5)
    fresh = mixed(use_dora=True, trained=False).double()
    resumed = RankFlow(fresh, BudgetSpec(**ALL_FOUR), STEPS, resume=load_state(tmp_path))
    assert fresh.load_state_dict(saved["model"], strict=True) == ([], [])
    other = make_optimizer(fresh, lr=0.05)
    other.load_state_dict(saved["optimizer"])
    resumed.attach(other)
    train_mixed(fresh, resumed, other, first=stopped)
    assert untimed(resumed.history) == untimed(flow.history)
    assert magnitudes_in(fresh) == magnitudes_in(model)
    for name, parameter in adapter_parameters(fresh).items():
        assert torch.equal(parameter, adapter_parameters(model)[name])


def test_a_running_budgeted_engine_can_be_set_back(mixed):
    model, flow, optimizer = start_mixed(mixed, ALL_FOUR)
    train_mixed(model, flow, optimizer, last=6)
    on = magnitudes_in(model)
    state, saved = flow.state_dict(), copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train_mixed(model, flow, optimizer, first=6)
    history, parameters = untimed(flow.history), copy.deepcopy(adapter_parameters(model))
    assert magnitudes_in(model) != on
    flow.load_state_dict(state)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    assert magnitudes_in(model) == on
    train_mixed(model, flow, optimizer, first=6)
    assert untimed(flow.history) == history
    for name, parameter in adapter_parameters(model).items():
        assert torch.equal(parameter, parameters[name])


def test_every_sink_survives_events_of_magnitudes(mixed, tmp_path):
    model, flow, optimizer = start_mixed(mixed, ALL_FOUR)
    log, board, lines = EventLog(tmp_path / "events.jsonl"), TensorBoardSink(tmp_path), []
    flow.sinks += [log, board, lambda event: lines.append(describe_event(event))]
    train_mixed(model, flow, optimizer)
    board.close()
    assert read_events(tmp_path / "events.jsonl") == flow.history
    on = sum(flow.history[-1].magnitudes.values())
    assert 0 < on < 5
    assert f"magnitudes {on} of 5" in lines[-1]
    scalars = EventAccumulator(str(tmp_path)).Reload().Scalars("rankflow/magnitudes")
    assert [s.value for s in scalars] == [sum(e.magnitudes.values()) for e in flow.history]
