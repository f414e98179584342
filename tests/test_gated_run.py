"""The engine on gated components: cost, optimizers, resuming, export."""

import copy
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn import functional

from rankflow.adapters.gating import add_gates
from rankflow.adapters.newborns import orthogonal
from rankflow.adapters.sites import Site, find_sites
from rankflow.adapters.vera import draw_matrices
from rankflow.checkpoint import load_state, save_state
from rankflow.engine import RankFlow
from rankflow.errors import CheckpointError, SiteError, SurgeryError
from rankflow.export.peft import export_adapter
from rankflow.records import RankPlan
from rankflow.specs.budget import BudgetSpec
from rankflow.surgery import resize

STEPS = 32
TARGETS = ["embed", "first", "second", "third"]
GATED = {"rank": 2, "components": "gated", "warmup": 4, "cooldown": 8, "every": 4, "decay": 0.5}
OUTPUTS = 6 + 8 + 10 + 4
VERA = {key: value for key, value in GATED.items() if key != "rank"}
VERA |= {"components": "vera", "params": OUTPUTS + 12, "max_rank": 6}
BUDGETS = {
    "prune": GATED | {"start": 1.75, "schedule": "cubic-late", "recycle": 0.0, "dem": 0.3},
    "reallocate": GATED | {"recycle": 0.6, "hysteresis": 0.0, "protect": 0},
    "starve": GATED | {"rank": 0.6, "start": 2.5, "schedule": "linear", "recycle": 0.4},
    "churn": GATED | {"every": 1, "recycle": 1.0, "score": "random", "hysteresis": 0, "protect": 0},
    "vera": VERA | {"start": 1.1, "schedule": "cubic-late", "recycle": 0.0},
    "vera that moves": VERA | {"recycle": 0.9, "hysteresis": 0.0, "protect": 0},
}


def budget_of(name, use_dora=False):
    """The budget of that name; VeRA's pays for factors of rows, and of magnitudes as well."""
    budget = dict(BUDGETS[name])
    if budget["components"] == "vera":
        budget["params"] += OUTPUTS * use_dora
    return BudgetSpec(**budget)


def newborns():
    return orthogonal(torch.Generator().manual_seed(5))


class Net(nn.Module):
    """An embedding, three layers of different shapes, and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 10)
        self.third = nn.Linear(10, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = torch.tanh(self.first(torch.tanh(self.embed(tokens))))
        return self.head(torch.tanh(self.third(torch.tanh(self.second(x)))))


def make_model(**config):
    torch.manual_seed(0)
    config = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | config
    return peft.get_peft_model(Net(), peft.LoraConfig(**config))


def make_optimizer(model):
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)


def start(name, **config):
    model = make_model(**config)
    flow = RankFlow(model, budget_of(name, config.get("use_dora", False)), STEPS)
    return model, flow, make_optimizer(model)


def loss_of(model, step):
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (16,), generator=generator)
    return functional.cross_entropy(model(tokens), tokens % 3)


def train(model, flow, optimizer, first=0, last=STEPS):
    for step in range(first, last):
        (loss_of(model, step) + flow.penalty()).backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)


def trained_parameters(model):
    """Every trainable tensor, gates and raw B included, in the model's order."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def adapter_tensors(model):
    """What is trained, and the frozen factors of VeRA."""
    return {name: p.detach() for name, p in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("name", BUDGETS)
def test_every_event_counts_the_gates_and_stays_within_the_budget(name, use_dora):
    model, flow, optimizer = start(name, use_dora=use_dora)
    changed = 0
    for step in range(STEPS):
        train(model, flow, optimizer, step, step + 1)
        assert flow.spent == sum(p.numel() for p in trained_parameters(model).values())
        assert flow.spent <= flow.limit
        for site in flow._sites:
            assert len(site.gate) == site.rank
            assert site.scale == 2
    for event in flow.history:
        changed += len(event.pruned) + len(event.born)
    assert changed > 0
    assert flow.spent <= flow.resolved.target


def test_the_budget_of_a_rank_is_plain_loras():
    plain = RankFlow(make_model(), BudgetSpec(rank=2), STEPS)
    gated = RankFlow(make_model(), BudgetSpec(rank=2, components="gated"), STEPS)
    assert gated.limit == plain.limit == plain.spent
    assert gated.spent <= gated.limit


def test_construction_keeps_the_function_and_draws_equal_factors_from_equal_seeds(use_dora):
    tokens = torch.arange(7)
    model = make_model(use_dora=use_dora)
    before = model(tokens).detach()
    RankFlow(model, BudgetSpec(**BUDGETS["prune"]), STEPS)
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)
    torch.manual_seed(77)
    twin, _, _ = start("prune", use_dora=use_dora)
    for mine, other in zip(find_sites(model), find_sites(twin), strict=True):
        assert not mine.gate.any()
        assert mine.B.any()
        assert torch.equal(mine.A, other.A)
        assert torch.equal(mine.B, other.B)


def test_a_birth_changes_no_output_and_draws_both_factors(use_dora):
    model, flow, optimizer = start("prune", use_dora=use_dora)
    train(model, flow, optimizer, 0, 3)
    site = flow._sites[1]
    keep = [np.arange(s.rank) for s in flow._sites]
    births = np.array([int(s is site) for s in flow._sites])
    tokens, rank = torch.arange(7), site.rank
    before, moments = model(tokens).detach(), copy.deepcopy(optimizer.state[site.gate])
    resize(
        flow._sites,
        RankPlan(tuple(keep), births),
        optimizer,
        newborns(),
    )
    torch.testing.assert_close(model(tokens), before, rtol=1e-5, atol=1e-6)
    assert site.rank == rank + 1
    assert site.gate[-1] == 0
    assert site.A[-1].abs().min() > 0
    assert site.B[:, -1].abs().min() > 0
    for key in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(optimizer.state[site.gate][key][:-1], moments[key])
        assert optimizer.state[site.gate][key][-1] == 0


@pytest.mark.parametrize("name", BUDGETS)
def test_an_export_is_the_live_function_in_stock_peft(name, use_dora, tmp_path):
    model, flow, optimizer = start(name, use_dora=use_dora)
    train(model, flow, optimizer)
    tokens = torch.arange(7)
    for write in ("export", "save_pretrained"):
        path = tmp_path / write
        export_adapter(model, path) if write == "export" else model.save_pretrained(path)
        torch.manual_seed(0)
        stock = peft.PeftModel.from_pretrained(Net(), path)
        assert not any("gate" in key for key in stock.state_dict())
        torch.testing.assert_close(stock(tokens), model(tokens), rtol=1e-5, atol=1e-6)


def test_a_resize_that_fails_puts_every_factor_and_its_state_back(use_dora, monkeypatch):
    model, flow, optimizer = start("prune", use_dora=use_dora)
    train(model, flow, optimizer, 0, 3)
    before = [p for site in flow._sites for p, _ in site.factors]
    state, groups = dict(optimizer.state), list(optimizer.param_groups[0]["params"])
    install, calls = Site.install, []

    def fail_late(site, **factors):
        install(site, **factors)
        calls.append(site)
        if len(calls) == 3:
            raise RuntimeError("no memory")

    monkeypatch.setattr(Site, "install", fail_late)
    plan = RankPlan(tuple(np.array([1]) for _ in flow._sites), np.array([1, 0, 2, 0]))
    with pytest.raises(RuntimeError, match="no memory"):
        resize(flow._sites, plan, optimizer, newborns())
    assert all(
        p is old
        for p, old in zip((p for site in flow._sites for p, _ in site.factors), before, strict=True)
    )
    assert dict(optimizer.state) == state
    assert all(p is old for p, old in zip(optimizer.param_groups[0]["params"], groups, strict=True))


def test_a_newborn_s_gate_takes_the_adam_steps_of_step_0():
    model, flow, optimizer = start("prune")
    train(model, flow, optimizer, 0, 3)
    site = flow._sites[2]
    plan = RankPlan(
        tuple(np.arange(s.rank) for s in flow._sites),
        np.array([int(s is site) for s in flow._sites]),
    )
    resize(flow._sites, plan, optimizer, newborns())
    flow._observers.fair_start.follow(plan)
    gradients = torch.randn(6, generator=torch.Generator().manual_seed(1)).tolist()
    lone = torch.zeros(1, requires_grad=True)
    reference = torch.optim.AdamW([lone], lr=0.03)
    for gradient in gradients:
        optimizer.zero_grad(set_to_none=True)
        site.gate.grad = torch.full_like(site.gate, gradient)
        lone.grad = torch.full_like(lone, gradient)
        optimizer.step()
        reference.step()
        # float32: Adam divides by a second moment that was scaled up and will be corrected down.
        torch.testing.assert_close(site.gate[-1:], lone, rtol=1e-4, atol=1e-7)


def test_vera_s_sites_hold_different_components_of_the_same_matrices_after_births(use_dora):
    model, flow, optimizer = start("vera that moves", use_dora=use_dora)
    train(model, flow, optimizer)
    assert any(event.born for event in flow.history)
    matrices = draw_matrices(flow._sites, 6, flow.budget.seed)
    chosen = set()
    for site in flow._sites:
        rows = [
            (matrices.A[:, : site.in_features] == a).all(1).nonzero().item()
            for a in site.A.detach()
        ]
        assert len(set(rows)) == site.rank
        assert torch.equal(site.B.detach(), matrices.B[: site.out_features, rows])
        chosen.add(tuple(rows))
    assert len(chosen) > 1


@pytest.mark.parametrize("name", ["prune", "vera"])
def test_a_pruned_site_keeps_the_scale_of_its_rows(name):
    _, flow, optimizer = start(name, use_dora=True)
    train(flow.model, flow, optimizer, 0, 3)

    def factors():
        for site in flow._sites[1:]:
            V = site.layer.get_base_layer().weight + site.scale * site.effective_B @ site.A
            yield (site.magnitude / V.norm(dim=1)).detach()

    before = list(factors())
    keep = tuple(np.array([0]) for _ in flow._sites)
    plan = RankPlan(keep, np.zeros(4, np.int64))
    resize(flow._sites, plan, optimizer, newborns(), renormalise="keep-scale")
    for old, new in zip(before, factors(), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-5, atol=0)


def test_vera_of_a_fixed_rank_trains_like_pefts():
    def run(model, optimizer, after_step):
        for step in range(12):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            after_step(optimizer)
        return model(torch.arange(7))

    linear = TARGETS[1:]
    mine = make_model(r=4, lora_alpha=4, target_modules=linear)
    budget = BudgetSpec(params=8 + 10 + 4 + 3 * 4, max_rank=4, policy="uniform", components="vera")
    flow = RankFlow(mine, budget, 12)
    config = peft.VeraConfig(r=4, projection_prng_key=0, target_modules=linear)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Net(), config)
    assert flow.spent == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    # Twelve float32 steps of Adam, whose first ones turn rounding of gradients into steps.
    torch.testing.assert_close(
        run(mine, make_optimizer(mine), flow.attach),
        run(theirs, make_optimizer(theirs), lambda optimizer: None),
        rtol=1e-4,
        atol=1e-5,
    )


# --- optimizers


@pytest.mark.parametrize("name", ["prune", "vera"])
def test_an_optimizer_made_before_trains_the_gates_in_the_order_of_one_made_after(name, use_dora):
    model = make_model(use_dora=use_dora)
    early = torch.optim.AdamW(
        [
            {"params": [model.base_model.model.head.weight], "lr": 0.1},
            {"params": [p for p in model.parameters() if p.requires_grad]},
        ],
        lr=0.03,
    )
    flow = RankFlow(model, budget_of(name, use_dora), STEPS)
    flow.attach(early)
    assert [id(p) for p in early.param_groups[1]["params"]] == [
        id(p) for p in model.parameters() if p.requires_grad
    ]
    assert len(early.param_groups[0]["params"]) == 1
    other, other_flow, late = start(name, use_dora=use_dora)
    train(model, flow, early)
    train(other, other_flow, late)
    mine, theirs = trained_parameters(model), trained_parameters(other)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_an_optimizer_that_has_trained_without_the_gates_is_refused():
    model = make_model()
    optimizer = make_optimizer(model)
    flow = RankFlow(model, BudgetSpec(**BUDGETS["prune"]), STEPS)
    loss_of(model, 0).backward()
    flow.observe()
    optimizer.step()
    with pytest.raises(SurgeryError, match=r"without the gates of site 'embed'.*attach"):
        flow.step(optimizer)


def test_gates_learn_from_the_first_step():
    model, flow, optimizer = start("prune")
    train(model, flow, optimizer, 0, 1)
    assert all(site.gate.abs().min() > 0 for site in flow._sites)


def test_a_trained_adapter_is_refused():
    model = make_model()
    model.base_model.model.first.lora_B["default"].weight.data += 1
    with pytest.raises(SiteError, match="1 of 4 sites have been trained, the first is 'first'"):
        RankFlow(model, BudgetSpec(**BUDGETS["prune"]), STEPS)


def test_a_gated_adapter_goes_on_under_a_second_engine_as_it_was():
    model, flow, optimizer = start("reallocate")
    train(model, flow, optimizer)
    flow.close()
    before = copy.deepcopy(trained_parameters(model))
    ranks = flow.ranks
    pattern = {"policy": "frozen", "ranks": ranks, "components": "gated"}
    again = RankFlow(model, BudgetSpec(params=flow.spent, **pattern), STEPS)
    assert again.ranks == ranks
    after = trained_parameters(model)
    assert all(torch.equal(before[key], after[key]) for key in before)


# --- the regulariser


def test_the_regulariser_s_gradient_is_that_of_the_penalty_in_the_loss(use_dora):
    model, flow, _ = start("prune", use_dora=use_dora)
    loss_of(model, 0).backward()
    flow.regularise()
    added = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (loss_of(model, 0) + flow.penalty()).backward()
    for key, p in model.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(added[key], p.grad, rtol=1e-5, atol=1e-8)


def test_without_a_weight_there_is_no_penalty():
    model, flow, _ = start("reallocate")
    assert flow.penalty().item() == 0
    flow.regularise()
    assert all(p.grad is None for p in model.parameters())


def test_the_penalty_is_weighted_by_eta_and_the_components_at_the_start():
    _, flow, _ = start("prune")
    spread = 0.0
    for site in flow._sites:
        for vectors in (site.A.detach().double(), site.B.detach().double().T):
            spread += sum(float(np.var(vector.numpy())) for vector in vectors)
    components = sum(flow.ranks.values())
    assert flow.penalty().item() == pytest.approx(0.3 * spread / (2 * components), rel=1e-5)


# --- resuming


@pytest.mark.parametrize("kill_at", [1, 7, 13, 30])
@pytest.mark.parametrize("name", BUDGETS)
def test_a_killed_run_goes_on_bit_for_bit_from_stock_files(name, kill_at, use_dora, tmp_path):
    model, flow, optimizer = start(name, use_dora=use_dora)
    train(model, flow, optimizer)

    killed, first, its_optimizer = start(name, use_dora=use_dora)
    train(killed, first, its_optimizer, 0, kill_at)
    save_state(first.state_dict(), tmp_path)
    adapter = copy.deepcopy(peft.get_peft_model_state_dict(killed))
    moments = copy.deepcopy(its_optimizer.state_dict())
    assert not any("gate" in key for key in adapter)

    resumed = make_model(use_dora=use_dora)
    second = RankFlow(resumed, budget_of(name, use_dora), STEPS, resume=load_state(tmp_path))
    peft.set_peft_model_state_dict(resumed, adapter)
    for key, value in adapter_tensors(killed).items():
        assert torch.equal(adapter_tensors(resumed)[key], value), key
    optimizer_again = make_optimizer(resumed)
    optimizer_again.load_state_dict(moments)
    second.attach(optimizer_again)
    train(resumed, second, optimizer_again, kill_at)
    mine, theirs = adapter_tensors(resumed), adapter_tensors(model)
    assert all(torch.equal(mine[key], theirs[key]) for key in mine | theirs)

    def untimed(history):
        return [replace(event, seconds=0.0) for event in history]

    assert untimed(second.history) == untimed(flow.history)


def test_a_state_of_ordinary_components_is_refused():
    ordinary = RankFlow(make_model(), BudgetSpec(rank=2), STEPS).state_dict()
    with pytest.raises(CheckpointError, match="other budget"):
        RankFlow(make_model(), BudgetSpec(rank=2, components="gated"), STEPS, resume=ordinary)


def test_a_state_is_a_snapshot():
    model, flow, optimizer = start("prune")
    state = flow.state_dict()
    train(model, flow, optimizer, 0, 1)
    assert not state["gated"]["first.gate"].any()


def test_ordinary_components_need_no_state_of_their_own():
    assert RankFlow(make_model(), BudgetSpec(rank=2), STEPS).state_dict()["gated"] == {}


def test_gates_put_on_by_hand_are_steered_too():
    model = make_model()
    add_gates(find_sites(model))
    flow = RankFlow(model, BudgetSpec(rank=2, every=4, recycle=0.5), STEPS)
    optimizer = make_optimizer(model)
    train(model, flow, optimizer)
    assert flow.spent == sum(p.numel() for p in trained_parameters(model).values()) <= flow.limit


@pytest.mark.parametrize("name", ["starve", "vera", "vera that moves"])
def test_magnitudes_of_gated_sites_compete_at_their_price(name):
    model = make_model(use_dora=True)
    spec = budget_of(name, True).model_copy(update={"magnitude": "budgeted", "score": "norm"})
    flow = RankFlow(model, spec, STEPS)
    optimizer = make_optimizer(model)
    train(model, flow, optimizer)
    assert any(c.component is None for event in flow.history for c in event.pruned)
    for event in flow.history:
        assert event.spent <= event.limit
    assert flow.spent == flow.history[-1].spent <= flow.resolved.target
