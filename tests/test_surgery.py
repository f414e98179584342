import copy
import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from rankflow import surgery
from rankflow.adapters.dead import DeadVariant
from rankflow.adapters.dora import accelerate_dora
from rankflow.adapters.newborns import orthogonal
from rankflow.adapters.sites import Site, find_sites
from rankflow.errors import SurgeryError
from rankflow.records import RankPlan

OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AdamW, one by one": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "Adam with amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "Adafactor of torch": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "Adafactor of transformers": lambda p: transformers.Adafactor(p, lr=1e-2, relative_step=False),
}
FACTORED = ("row_var", "col_var", "exp_avg_sq_row", "exp_avg_sq_col")
# The sites are embed, fan, first, second and conv, all of rank 3.
FULL = [0, 1, 2]
PLANS = {
    "shrink": ([[0, 2], [1], FULL, [2], [0, 1]], [0, 0, 0, 0, 0]),
    "grow": ([FULL] * 5, [1, 2, 0, 1, 1]),
    "both": ([[1, 2], [0], FULL, [0, 2], [1]], [2, 1, 1, 1, 3]),
    "to nothing": ([[], [], FULL, [], []], [0, 0, 0, 0, 0]),
    "all new": ([[], [], [], [], []], [1, 2, 3, 2, 1]),
}

# Rescaled magnitudes are the most that an event can change.
resize = partial(surgery.resize, renormalise="keep-scale")
resize_in_place = partial(surgery.resize_in_place, renormalise="keep-scale")


@pytest.fixture(params=OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def make_optimizer(request):
    return request.param


@pytest.fixture(params=PLANS.values(), ids=PLANS.keys())
def plan(request):
    return make_plan(*request.param)


def make_plan(keep, births):
    return RankPlan(tuple(np.array(k, dtype=np.int64) for k in keep), np.array(births))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def newborns(seed=0):
    return orthogonal(generator(seed))


def tokens(seed=0):
    return torch.randint(11, (4, 4), generator=generator(seed))


def take_steps(model, optimizer, count=3):
    for seed in range(count):
        optimizer.zero_grad(set_to_none=True)
        model(tokens(seed)).square().mean().backward()
        optimizer.step()


# --- survivors


def test_survivors_keep_their_values(mixed, plan, use_dora):
    model = mixed(use_dora=use_dora)
    sites = find_sites(model)
    before = [(s.A.detach().clone(), s.B.detach().clone()) for s in sites]
    magnitudes = [s.magnitude for s in sites]
    resize(sites, plan, None, newborns(), renormalise="none")
    for site, (A, B), keep, magnitude in zip(sites, before, plan.keep, magnitudes, strict=True):
        assert torch.equal(site.A[: len(keep)], A[keep])
        assert torch.equal(site.B[:, : len(keep)], B[:, keep])
        assert site.magnitude is magnitude
    assert [site.rank for site in sites] == plan.ranks.tolist()


def test_survivors_keep_their_state_and_newborns_start_at_zero(mixed, plan, make_optimizer):
    model = mixed(use_dora=True)
    optimizer = make_optimizer(trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)
    before = copy.deepcopy([(p, optimizer.state[p]) for s in sites for p in (s.A, s.B)])
    resize(sites, plan, optimizer, newborns())
    after = [p for s in sites for p in (s.A, s.B)]
    keeps = [(keep, births) for keep, births in zip(plan.keep, plan.births, strict=True)]
    compared = 0
    for i, ((old, state), new) in enumerate(zip(before, after, strict=True)):
        keep, births = keeps[i // 2]
        rank_axis = i % 2
        if len(keep) == 0:
            assert not optimizer.state.get(new)  # it starts afresh, step count and all
            continue
        now = optimizer.state.get(new, {})
        assert now.keys() == state.keys()
        for key, value in state.items():
            if not isinstance(value, torch.Tensor) or value.ndim == 0:
                assert now[key] is value or now[key] == value
            elif value.shape == old.shape and key not in FACTORED:
                kept, born = now[key].split([len(keep), int(births)], dim=rank_axis)
                assert torch.equal(kept, value.index_select(rank_axis, torch.as_tensor(keep)))
                assert not born.any()
                compared += 1
    factored = isinstance(optimizer, torch.optim.Adafactor | transformers.Adafactor)
    stateless = isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["momentum"]
    if len(np.concatenate(plan.keep)) and not factored and not stateless:
        assert compared > 0


@pytest.mark.parametrize(
    ("name", "row", "column", "dropped"),
    [
        ("Adafactor of torch", "row_var", "col_var", False),
        ("Adafactor of transformers", "exp_avg_sq_row", "exp_avg_sq_col", True),
    ],
)
def test_factored_moments_follow_the_rank(name, row, column, dropped, mixed):
    model = mixed()
    optimizer = OPTIMIZERS[name](trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)
    before = copy.deepcopy([(optimizer.state[s.A], optimizer.state[s.B]) for s in sites])
    resize(sites, make_plan([[0, 2]] * 5, [1, 1, 1, 1, 1]), optimizer, newborns())
    for site, (state_A, state_B) in zip(sites, before, strict=True):
        for parameter, state, rank_axis in ((site.A, state_A, 0), (site.B, state_B, 1)):
            now = optimizer.state[parameter]
            for key, lacking in ((row, parameter.ndim - 1), (column, parameter.ndim - 2)):
                if lacking == rank_axis:  # it says nothing of single components
                    assert torch.equal(now[key], state[key])
                    continue
                axis = rank_axis - int(dropped and lacking < rank_axis)
                kept = state[key].index_select(axis, torch.tensor([0, 2]))
                mean = kept.mean(dim=axis, keepdim=True)
                assert torch.equal(now[key], torch.cat([kept, mean], dim=axis))
            expected = list(parameter.shape)
            del expected[-1]
            assert list(now[row].shape) == (expected if dropped else [*expected, 1])


# Adafactor's update of one component depends on the norm of the whole tensor.
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if "Adafactor" not in name])
def test_a_survivors_next_step_is_the_one_it_would_have_taken(name, mixed):
    make_optimizer = OPTIMIZERS[name]
    models = [mixed().double() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [make_optimizer(trainable(model)) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        take_steps(model, optimizer)
    sites = [find_sites(model) for model in models]
    resize(sites[1], make_plan([[0, 2]] * 5, [0] * 5), optimizers[1], newborns())
    for whole, part in zip(*sites, strict=True):
        for p, q, axis in ((whole.A, part.A, 0), (whole.B, part.B, 1)):
            p.grad = torch.randn(p.shape, generator=generator(7), dtype=p.dtype)
            q.grad = p.grad.index_select(axis, torch.tensor([0, 2]))
    for optimizer in optimizers:
        optimizer.step()
    for whole, part in zip(*sites, strict=True):
        torch.testing.assert_close(part.A, whole.A[[0, 2]], rtol=1e-13, atol=0)
        torch.testing.assert_close(part.B, whole.B[:, [0, 2]], rtol=1e-13, atol=0)


def test_a_frozen_parameter_stays_frozen(mixed):
    model = mixed()
    sites = find_sites(model)
    sites[0].A.requires_grad_(False)
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer, 1)
    resize(sites, make_plan([[0]] * 5, [1] * 5), optimizer, newborns())
    assert not sites[0].A.requires_grad
    assert sites[0].B.requires_grad


# --- the optimizer stays bound


def test_groups_stay_the_same_objects_and_the_learning_rate_goes_on_decaying(
    mixed, plan, make_optimizer
):
    model = mixed(use_dora=True).double()  # so that a small step shows
    parameters = trainable(model)
    optimizer = make_optimizer(
        [{"params": parameters[:5], "lr": 1e-2}, {"params": parameters[5:], "lr": 3e-2}]
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=10)
    take_steps(model, optimizer, 2)
    scheduler.step()
    groups, state = list(optimizer.param_groups), optimizer.state
    lists = [group["params"] for group in groups]
    old = [list(params) for params in lists]
    names = {id(p): name for name, p in model.named_parameters()}
    order = [[names[id(p)] for p in params] for params in lists]

    sites = find_sites(model)
    resize(sites, plan, optimizer, newborns())

    assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
    assert all(g["params"] is params for g, params in zip(groups, lists, strict=True))
    assert optimizer.state is state
    names = {id(p): name for name, p in model.named_parameters()}
    assert [[names[id(p)] for p in params] for params in lists] == order
    replaced = {id(p) for s in sites for p in (s.A, s.B)} - {id(p) for ps in old for p in ps}
    assert replaced
    assert {id(p) for p in state} <= {id(p) for params in lists for p in params}

    moving = {
        name: p.detach().clone()
        for name, p in model.named_parameters()
        if p.requires_grad and p.numel() > 0 and not is_still_zero(name, sites)
    }
    assert len(moving) > 5  # the magnitudes, and more
    rates = []
    for _ in range(3):
        take_steps(model, optimizer, 1)
        scheduler.step()
        rates.append(groups[1]["lr"])
        for name, before in moving.items():
            assert not torch.equal(model.get_parameter(name), before)
    assert rates == sorted(rates, reverse=True)
    assert len(set(rates)) == 3


def is_still_zero(name, sites):
    """Whether a factor has no gradient at first, since its partner is zero."""
    for site in sites:
        if name.startswith(f"base_model.model.{site.name}."):
            partner = site.A if "_B" in name else site.B
            return "magnitude" not in name and not partner.any()
    raise AssertionError(name)


def test_resizing_again_and_again_keeps_training(mixed, make_optimizer, use_dora):
    model = mixed(use_dora=use_dora)
    optimizer = make_optimizer(trainable(model))
    sites = find_sites(model)
    for keep, births in (
        ([[0, 1]] * 5, [1] * 5),
        ([[]] * 5, [0] * 5),
        ([[]] * 5, [2] * 5),
        ([[1]] * 5, [1] * 5),
    ):
        resize(sites, make_plan(keep, births), optimizer, newborns())
        take_steps(model, optimizer, 2) if sites[0].rank or use_dora else None
        assert {id(p) for p in trainable(model)} == {
            id(p) for g in optimizer.param_groups for p in g["params"]
        }
        assert all(torch.isfinite(p).all() for p in model.parameters())
    before = model(tokens()).square().mean().item()
    take_steps(model, optimizer, 6)
    assert model(tokens()).square().mean().item() < before


def test_an_untouched_site_keeps_its_very_parameters(mixed):
    model = mixed()
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)
    before = [(s.A, s.B, optimizer.state[s.A]) for s in sites]
    resize(sites, make_plan([FULL, FULL, [0], FULL, FULL], [0, 0, 0, 0, 1]), optimizer, newborns())
    for i in (0, 1, 3):
        assert sites[i].A is before[i][0]
        assert sites[i].B is before[i][1]
        assert optimizer.state[sites[i].A] is before[i][2]


def test_a_saved_optimizer_state_loads_after_the_resize(mixed, make_optimizer):
    model = mixed()
    optimizer = make_optimizer(trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)
    resize(sites, make_plan(*PLANS["both"]), optimizer, newborns())
    take_steps(model, optimizer, 1)
    twin = copy.deepcopy(model)
    other = make_optimizer(trainable(twin))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (twin, other)):
        take_steps(m, o, 2)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


# --- births


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.float64, 1e-14)])
@pytest.mark.parametrize(("keep", "births"), [(3, 2), (3, 1), (0, 2)])
def test_a_birth_leaves_the_function_as_it_was(
    dtype, rtol, keep, births, layer_case, host, adapt, use_dora
):
    model = adapt(host(layer_case), use_dora=use_dora).to(dtype)
    sites = find_sites(model)
    resize(sites, make_plan([range(keep)], [0]), None, newborns())
    x = layer_case.inputs()
    x = x.to(dtype) if x.is_floating_point() else x
    before = model(x).detach()
    resize(sites, make_plan([range(keep)], [births]), None, newborns())
    assert sites[0].rank == keep + births
    assert (model(x) - before).abs().max() <= rtol * before.abs().max()


def test_newborn_directions_are_orthogonal_and_of_pefts_own_length(layer_case, host, adapt):
    model = adapt(host(layer_case)).double()
    (site,) = find_sites(model)
    resize([site], make_plan([FULL], [2]), None, newborns())
    A, B = site.A.detach().flatten(1), site.B.detach().flatten(1).T
    rows, zeros = (B, A) if site.kind == "embedding" else (A, B)
    assert not zeros[3:].any()
    born = rows[3:]
    assert (rows[:3] @ born.T).abs().max() < 1e-12
    length = math.sqrt(6) if site.kind == "embedding" else 1 / math.sqrt(3)
    torch.testing.assert_close(born @ born.T, length**2 * torch.eye(2).double())


def test_the_length_of_a_newborn_is_that_of_pefts_initialisation(host, adapt):
    drawn = {}
    for name, layer in {
        "linear": nn.Linear(200, 50),
        "conv": nn.Conv2d(20, 50, 3),
        "embedding": nn.Embedding(200, 50),
    }.items():
        base = nn.ModuleDict({"layer": layer})
        model = adapt(base, r=40, trained=False)
        (site,) = find_sites(model)
        rows = site.B.detach().T if name == "embedding" else site.A.detach().flatten(1)
        drawn[name] = rows.norm(dim=1).square().mean().sqrt().item()
        resize([site], make_plan([[0]], [1]), None, newborns())
        rows = site.B.detach().T if name == "embedding" else site.A.detach().flatten(1)
        # 40 rows of 50 to 200 entries: the mean square is known to a few percent.
        assert rows[1].norm().item() == pytest.approx(drawn[name], rel=0.1)


def test_equal_seeds_give_equal_newborns(mixed):
    births = []
    for seed in (0, 0, 1):
        torch.manual_seed(0)
        sites = find_sites(mixed())
        resize(sites, make_plan([FULL] * 5, [1] * 5), None, newborns(seed))
        births.append(torch.cat([s.A.detach()[3].flatten() for s in sites[1:]]))
    assert torch.equal(births[0], births[1])
    assert not torch.isclose(births[0], births[2]).any()


# --- memory


def test_memory_shrinks_and_grows_with_the_ranks(mixed):
    model = mixed(use_dora=True)
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)

    def held():
        """Bytes behind the parameters and their moments, counted by storage."""
        moments = [v for state in optimizer.state.values() for v in state.values() if v.ndim]
        sizes = [
            sum(
                {
                    t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors
                }.values()
            )
            for tensors in ([p.data for p in trainable(model)], moments)
        ]
        return tuple(sizes)

    def expected():
        costs = [s.describe() for s in sites]
        return 4 * sum(
            c.fixed_cost + c.component_cost * s.rank for c, s in zip(costs, sites, strict=True)
        )

    for plan in (
        make_plan([[0], FULL, [1, 2], [0], [2]], [0] * 5),
        make_plan([[0], [0, 1], [0, 1], [0], [0]], [2, 0, 1, 1, 0]),
        make_plan([[], [0], [], [0], []], [0] * 5),
    ):
        resize(sites, plan, optimizer, newborns())
        assert held() == (expected(), 2 * expected())


def test_an_older_graph_holds_no_memory_is_refused_and_disturbs_nothing(mixed, use_dora):
    model = mixed(use_dora=use_dora)
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)
    old = [p for site in sites for p in (site.A, site.B)]
    older = model(tokens()).square().mean()
    resize(sites, make_plan(*PLANS["both"]), optimizer, newborns())
    replaced = [p for p in old if not any(p is q for site in sites for q in (site.A, site.B))]
    assert len(replaced) == 10
    assert all(p.untyped_storage().nbytes() == 0 for p in replaced)
    take_steps(model, optimizer)
    with pytest.raises(RuntimeError):
        older.backward()
    take_steps(model, optimizer)
    assert all(site.A.grad is None or site.A.grad.shape == site.A.shape for site in sites)


def test_old_gradients_do_not_reach_new_parameters(mixed):
    model = mixed()
    optimizer = torch.optim.AdamW(trainable(model))
    model(tokens()).square().mean().backward()
    sites = find_sites(model)
    resize(sites, make_plan(*PLANS["both"]), optimizer, newborns())
    assert all(p.grad is None for s in sites for p in (s.A, s.B))
    optimizer.step()


# --- all or nothing


def snapshot(model, optimizer):
    """Everything that a failed event must leave bit for bit."""
    sites = find_sites(model)
    return {
        "parameters": [(name, id(p), p.detach().clone()) for name, p in model.named_parameters()],
        "groups": [[id(p) for p in group["params"]] for group in optimizer.param_groups],
        "options": [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups],
        "state": [
            (id(p), [(key, copy.deepcopy(value)) for key, value in state.items()])
            for p, state in optimizer.state.items()
        ],
        "peft": [
            [float(facts["default"]) for facts in (s.layer.r, s.layer.lora_alpha, s.layer.scaling)]
            for s in sites
        ],
        "variants": [
            {name: type(variant) for name, variant in s.layer.lora_variant.items()} for s in sites
        ],
        "shapes": [
            (module.in_features, module.out_features)
            for module in model.modules()
            if isinstance(module, nn.Linear)
        ],
        "output": model(tokens()).detach(),
    }


def assert_unchanged(now, before):
    """Compare two snapshots bit for bit."""
    assert type(now) is type(before)
    if isinstance(now, torch.Tensor):
        assert now.dtype == before.dtype
        assert torch.equal(now, before)
    elif isinstance(now, dict):
        assert list(now) == list(before)
        assert_unchanged(list(now.values()), list(before.values()))
    elif isinstance(now, list | tuple):
        assert len(now) == len(before)
        for a, b in zip(now, before, strict=True):
            assert_unchanged(a, b)
    else:
        assert now == before


class FailingState(dict):
    """An optimizer state that fails at the k-th change, once."""

    def __init__(self, state, k):
        super().__init__(state)
        self.left = k

    def _count(self):
        self.left -= 1
        if self.left == 0:
            raise RuntimeError("injected")

    def __setitem__(self, key, value):
        self._count()
        super().__setitem__(key, value)

    def pop(self, *args):
        self._count()
        return super().pop(*args)


# From ranks (3, 3, 0, 3, 3): dying, shrinking, reviving, replacing and growing.
HARD_PLAN = make_plan([[], [1], [], [0, 2], FULL], [0, 0, 2, 1, 1])


@pytest.fixture
def trained(mixed, use_dora):
    """A model with a dead site, and an optimizer with a state."""
    model = mixed(use_dora=use_dora)
    optimizer = torch.optim.AdamW(trainable(model))
    resize(
        find_sites(model), make_plan([FULL, FULL, [], FULL, FULL], [0] * 5), optimizer, newborns()
    )
    take_steps(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("when", ["before", "half way", "after"])
def test_a_failing_installation_leaves_everything_as_it_was(k, when, trained, monkeypatch):
    model, optimizer = trained
    before = snapshot(model, optimizer)
    install, calls = Site.install, []

    def fail(site, A, B, **others):
        calls.append(site)
        if len(calls) != k:
            install(site, A, B, **others)
            return
        if when == "after":
            install(site, A, B, **others)
        if when == "half way" and site.kind == "linear":
            site.layer.lora_A["default"].weight = A
        raise KeyboardInterrupt("injected")

    monkeypatch.setattr(Site, "install", fail)
    with pytest.raises(KeyboardInterrupt, match="injected"):
        resize(find_sites(model), HARD_PLAN, optimizer, newborns())
    assert len(calls) >= k
    assert_unchanged(snapshot(model, optimizer), before)
    take_steps(model, optimizer)


# Two changes for each of the factors and, under DoRA, for each rescaled magnitude.
CHANGES = {False: 16, True: 22}


@pytest.mark.parametrize("k", range(1, CHANGES[True] + 1))
def test_a_failing_optimizer_state_leaves_everything_as_it_was(k, trained, use_dora):
    model, optimizer = trained
    k = min(k, CHANGES[use_dora])
    before = snapshot(model, optimizer)
    optimizer.state = FailingState(optimizer.state, k)
    with pytest.raises(RuntimeError, match="injected"):
        resize(find_sites(model), HARD_PLAN, optimizer, newborns())
    assert_unchanged(snapshot(model, optimizer), before)
    optimizer.state.left = 0
    take_steps(model, optimizer)


def test_the_failures_above_reach_the_end_of_the_event(trained, use_dora):
    model, optimizer = trained
    optimizer.state = FailingState(optimizer.state, 10**6)
    resize(find_sites(model), HARD_PLAN, optimizer, newborns())
    assert 10**6 - optimizer.state.left == CHANGES[use_dora]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.zeros(10, dtype=torch.uint8), r"'moment' for site 'conv' has shape \(10,\)"),
        (torch.zeros(3, 7), r"'moment' for site 'conv' has shape \(3, 7\) and type torch.float32"),
        (None, r"type torch.uint8, but the parameter has shape .* Use AdamW, SGD, Adafactor"),
    ],
    ids=["blocks", "odd shape", "quantised"],
)
def test_a_state_that_cannot_be_resized_is_refused_by_the_sites_name(value, message, trained):
    model, optimizer = trained
    site = find_sites(model)[-1]
    quantised = torch.zeros_like(site.B, dtype=torch.uint8)
    optimizer.state[site.B]["moment"] = quantised if value is None else value
    before = snapshot(model, optimizer)
    with pytest.raises(SurgeryError, match=message):
        resize(find_sites(model), HARD_PLAN, optimizer, newborns())
    assert_unchanged(snapshot(model, optimizer), before)


def test_an_optimizer_that_does_not_hold_the_adapter_is_refused(trained):
    model, optimizer = trained
    before = snapshot(model, optimizer)
    others = torch.optim.AdamW(p for p in trainable(model) if p is not find_sites(model)[3].B)
    with pytest.raises(
        SurgeryError, match=r"does not train the adapter of site 'second'; build it"
    ):
        resize(find_sites(model), HARD_PLAN, others, newborns())
    assert_unchanged(snapshot(model, optimizer), before)


@pytest.mark.parametrize(
    ("keep", "births", "message"),
    [
        ([FULL] * 4, [0] * 4, "speaks of 4 sites and the model has 5"),
        ([FULL] * 5, [0] * 4, "speaks of 5 sites and the model has 5"),
        ([FULL, FULL, [1, 0], FULL, FULL], [0] * 5, r"site 'first' of rank 3 is not valid"),
        ([FULL, FULL, [1, 1], FULL, FULL], [0] * 5, r"keep \[1, 1\], births 0; indices must asc"),
        ([FULL, FULL, [3], FULL, FULL], [0] * 5, r"site 'first' of rank 3 is not valid"),
        ([FULL, FULL, [-1], FULL, FULL], [0] * 5, r"site 'first' of rank 3 is not valid"),
        ([FULL] * 5, [0, 0, -1, 0, 0], r"site 'first' of rank 3 is not valid.*births -1"),
        ([FULL] * 5, [0, 0, 0, 2, 0], r"site 'second' cannot hold rank 5.* has rank 4 at most"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(keep, births, message, mixed):
    model = mixed()
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer)
    before = snapshot(model, optimizer)
    for attempt in (
        lambda: resize(find_sites(model), make_plan(keep, births), optimizer, newborns()),
        lambda: resize_in_place(find_sites(model), make_plan(keep, births), newborns()),
    ):
        with pytest.raises(SurgeryError, match=message):
            attempt()
    assert_unchanged(snapshot(model, optimizer), before)


# --- before training


def test_resizing_in_place_keeps_every_parameters_identity(mixed, plan, use_dora):
    model = mixed(use_dora=use_dora)
    twin = copy.deepcopy(model)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters)
    sites = find_sites(model)
    resize_in_place(sites, plan, newborns())
    assert [id(p) for p in trainable(model)] == [id(p) for p in parameters]
    resize(find_sites(twin), plan, None, newborns())
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(model(tokens()), twin(tokens()))
    take_steps(model, optimizer)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_resizing_in_place_drops_gradients_of_the_old_shape(mixed):
    model = mixed()
    optimizer = torch.optim.AdamW(trainable(model))
    model(tokens()).square().mean().backward()
    sites = find_sites(model)
    resize_in_place(sites, make_plan([[0]] * 5, [0] * 5), newborns())
    assert all(s.A.grad is None and s.B.grad is None for s in sites)
    take_steps(model, optimizer)


# --- magnitudes

ALL = [True] * 5
MIXED = [False, True, False, True, True]


def switch(magnitudes, keep=None, births=None):
    """Plan which magnitudes are on; all components of rank 3 stay unless told otherwise."""
    plan = make_plan([FULL] * 5 if keep is None else keep, [0] * 5 if births is None else births)
    return replace(plan, magnitudes=np.array(magnitudes))


def on_or_off(model):
    return [site.magnitude is not None for site in find_sites(model)]


def directions(site):
    """The rows of W + s B A, dense, shape (out, in)."""
    weight = site.layer.get_base_layer().weight.detach()
    rows = weight.T if site.name in ("embed", "fan") else weight.flatten(1)
    return rows + site.scale * (site.B.flatten(1) @ site.A.flatten(1)).detach()


def scales(site):
    """m / n of every row, dense."""
    return site.magnitude.detach().flatten() / directions(site).norm(dim=1)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
@pytest.mark.parametrize("births", [0, 1])
def test_turning_magnitudes_on_leaves_the_function_as_it_was(births, dtype, rtol, mixed):
    model = mixed(use_dora=True).to(dtype)
    sites = find_sites(model)
    resize(sites, switch([False] * 5, [[0, 2], [], [1], FULL, [0]]), None, newborns())
    assert on_or_off(model) == [False] * 5
    before = model(tokens()).detach()
    keep = [range(site.rank) for site in sites]
    resize(sites, switch(ALL, keep, [births] * 3 + [0, births]), None, newborns())
    assert on_or_off(model) == ALL
    assert (model(tokens()) - before).abs().max() <= rtol * before.abs().max()
    for site in sites:
        torch.testing.assert_close(scales(site), torch.ones(site.out_features).to(dtype))


def test_turning_a_magnitude_off_leaves_plain_lora(layer_case, host, adapt):
    model = adapt(host(layer_case), use_dora=True).double()
    (site,) = find_sites(model)
    x = layer_case.inputs()
    x = x.double() if x.is_floating_point() else x
    plan = replace(make_plan([[0, 2]], [1]), magnitudes=np.array([False]))
    resize([site], plan, None, newborns())
    base = site.layer.get_base_layer()
    V = layer_case.matrix(base.weight.detach())
    V = V + site.scale * (site.B.flatten(1) @ site.A.flatten(1)).detach()
    bias = getattr(base, "bias", None)
    expected = layer_case.apply(
        base, x, layer_case.weight_like(V, base.weight), None if bias is None else bias.detach()
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert site.parameters == site.A.numel() + site.B.numel()


MOMENTS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "AdamW, foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
}


@pytest.mark.parametrize("name", MOMENTS)
def test_the_optimizer_follows_magnitudes_that_go_come_and_stay(name, mixed):
    model = mixed(use_dora=True)
    sites = find_sites(model)
    resize_in_place(sites, switch([True, True, False, True, True]), newborns())
    optimizer = MOMENTS[name](trainable(model))
    take_steps(model, optimizer)
    old = [site.magnitude_slot for site in sites]
    state = [dict(optimizer.state.get(slot, {})) for slot in old]
    assert [bool(s) for s in state] == [True, True, False, True, True]
    # embed goes, fan is rescaled, first comes, second stays as it is, conv is rescaled and dies.
    plan = switch([False, True, True, True, True], [FULL, [1], FULL, FULL, []], [0, 1, 0, 0, 0])
    resize(sites, plan, optimizer, newborns())
    new = [site.magnitude_slot for site in sites]
    assert [a is b for a, b in zip(new, old, strict=True)] == [False, False, False, True, False]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trainable(model)}
    assert all(slot not in optimizer.state for slot in old if slot is not new[3])
    assert not optimizer.state.get(new[0])
    assert not optimizer.state.get(new[2])
    for i in (1, 3, 4):
        assert optimizer.state[new[i]].keys() == state[i].keys()
        for key, value in state[i].items():
            assert torch.equal(optimizer.state[new[i]][key], value)
    before = [slot.detach().clone() for slot in new]
    take_steps(model, optimizer, 1)
    assert not optimizer.state.get(new[0])
    for slot, value in zip(new[1:], before[1:], strict=True):
        assert not torch.equal(slot, value)
    if "Adam" in name:
        assert [int(optimizer.state[slot]["step"]) for slot in new[1:]] == [4, 1, 4, 4]
        # A first step of Adam has the length of the learning rate, whatever the others have done.
        moved = (new[2] - before[2] * (1 - 1e-4)).abs()
        torch.testing.assert_close(moved, torch.full_like(moved, 1e-2), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    "keep",
    [[[0, 2], [1], FULL, [2], [0, 1]], [[]] * 5, [[0]] * 5],
    ids=["some", "all", "most"],
)
@pytest.mark.parametrize("births", [0, 2])
def test_keep_scale_keeps_the_scale_of_every_row(keep, births, mixed):
    model = mixed(use_dora=True).double()
    sites = find_sites(model)
    before = [scales(site) for site in sites]
    assert any((scale - 1).abs().max() > 0.1 for scale in before)
    resize(sites, make_plan(keep, [births] * 5), None, newborns())
    for site, scale in zip(sites, before, strict=True):
        torch.testing.assert_close(scales(site), scale, rtol=1e-13, atol=0)


def test_without_renormalising_the_magnitude_keeps_its_value_and_identity(mixed):
    model = mixed(use_dora=True).double()
    sites = find_sites(model)
    slots = [site.magnitude for site in sites]
    before = [slot.detach().clone() for slot in slots]
    resize(sites, make_plan([[0]] * 5, [0] * 5), None, newborns(), renormalise="none")
    for site, slot, value in zip(sites, slots, before, strict=True):
        assert site.magnitude is slot
        assert torch.equal(slot, value)


@pytest.mark.parametrize("renormalise", ["keep-scale", "none"])
def test_births_alone_leave_magnitudes_alone(renormalise, mixed):
    model = mixed(use_dora=True)
    sites = find_sites(model)
    slots = [site.magnitude for site in sites]
    resize(sites, make_plan([FULL] * 5, [1] * 5), None, newborns(), renormalise=renormalise)
    assert all(site.magnitude is slot for site, slot in zip(sites, slots, strict=True))


def test_rows_of_zeros_and_magnitudes_of_zero_stay_what_they_are(mixed):
    model = mixed(use_dora=True).double()
    sites = find_sites(model)
    first, second = sites[2], sites[3]
    first.layer.get_base_layer().weight.data[1] = 0
    first.B.data[1] = 0  # a row without a direction
    first.magnitude.data[1] = 30
    first.magnitude.data[2] = 0  # a row that is switched off
    second.layer.get_base_layer().weight.data[0] = 0  # a row of components alone
    before = scales(second)
    resize(sites, make_plan([FULL, FULL, [0], [1], FULL], [0] * 5), None, newborns())
    assert first.magnitude[1] == 30
    assert first.magnitude[2] == 0
    torch.testing.assert_close(scales(second), before, rtol=1e-13, atol=0)
    resize(sites, make_plan([FULL, FULL, [0], [], FULL], [0] * 5), None, newborns())
    assert all(torch.isfinite(site.magnitude).all() for site in sites)


def test_a_magnitude_comes_on_at_a_site_that_is_dead(mixed):
    model = mixed(use_dora=True).double()
    sites = find_sites(model)
    resize(sites, switch([False] * 5, [[]] * 5), None, newborns())
    with model.disable_adapter():
        base = model(tokens())
    assert torch.equal(model(tokens()), base)
    assert sum(site.parameters for site in sites) == 0
    resize(sites, switch(ALL, [[]] * 5), None, newborns())
    torch.testing.assert_close(model(tokens()), base, rtol=1e-13, atol=1e-13)
    model(tokens()).square().mean().backward()
    assert all(site.magnitude.grad.any() for site in sites)


def test_a_plan_that_says_nothing_of_magnitudes_leaves_them_on_or_off(mixed):
    model = mixed(use_dora=True)
    sites = find_sites(model)
    resize(sites, switch(MIXED), None, newborns())
    resize(sites, make_plan([[0]] * 5, [1] * 5), None, newborns())
    assert on_or_off(model) == MIXED


def test_resizing_in_place_turns_magnitudes_off_and_on_and_keeps_their_identity(mixed):
    model = mixed(use_dora=True)
    twin = copy.deepcopy(model)
    parameters = trainable(model)
    optimizer = torch.optim.AdamW(parameters)
    for magnitudes in (MIXED, ALL, [False] * 5, MIXED):
        resize_in_place(find_sites(model), switch(magnitudes), newborns())
        resize(find_sites(twin), switch(magnitudes), None, newborns())
        assert on_or_off(model) == on_or_off(twin) == magnitudes
        assert [id(p) for p in trainable(model)] == [id(p) for p in parameters]
        assert torch.equal(model(tokens()), twin(tokens()))
    take_steps(model, optimizer)
    assert [bool(optimizer.state.get(s.magnitude_slot)) for s in find_sites(model)] == MIXED


def test_memory_of_a_magnitude_that_is_off_is_given_back(mixed):
    model = mixed(use_dora=True)
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer)
    sites = find_sites(model)
    resize(sites, switch(MIXED), optimizer, newborns())
    for site, on in zip(sites, MIXED, strict=True):
        held = site.magnitude_slot.untyped_storage().nbytes()
        assert held == (4 * site.out_features if on else 0)


@pytest.mark.parametrize("magnitudes", [[True] * 5, [False] * 4 + [True]])
def test_a_magnitude_for_plain_lora_is_refused_by_the_sites_name(magnitudes, mixed):
    model = mixed()
    optimizer = torch.optim.AdamW(trainable(model))
    take_steps(model, optimizer)
    before = snapshot(model, optimizer)
    name = "embed" if magnitudes[0] else "conv"
    with pytest.raises(SurgeryError, match=rf"gives site '{name}' a magnitude.*use_dora=True"):
        resize(find_sites(model), switch(magnitudes), optimizer, newborns())
    with pytest.raises(SurgeryError, match="speaks of 5 sites"):
        resize(find_sites(model), switch([False] * 4), optimizer, newborns())
    assert_unchanged(snapshot(model, optimizer), before)


def test_an_optimizer_without_the_magnitude_is_refused_before_it_comes_on(mixed):
    model = mixed(use_dora=True)
    sites = find_sites(model)
    resize_in_place(sites, switch(MIXED), newborns())
    others = torch.optim.AdamW(p for p in trainable(model) if p.numel() > 0)
    take_steps(model, others)
    before = snapshot(model, others)
    with pytest.raises(SurgeryError, match="does not train the adapter of site 'embed'"):
        resize(find_sites(model), switch(ALL), others, newborns())
    assert_unchanged(snapshot(model, others), before)


# From ranks (3, 3, 0, 3, 3) and magnitudes MIXED: going, coming, rescaled, coming alone, dying.
HARD_SWITCH = switch([True, False, True, True, False], [FULL, [1], [], [0, 2], []], [0, 1, 2, 0, 0])


@pytest.fixture(params=[False, True], ids=["PEFT's forward", "fast forward"])
def switched(request, mixed):
    """A model with a dead site and two magnitudes off, and an optimizer with a state."""
    model = mixed(use_dora=True)
    if request.param:
        accelerate_dora(model)
    optimizer = torch.optim.AdamW(trainable(model))
    keep = [FULL, FULL, [], FULL, FULL]
    resize(find_sites(model), switch(MIXED, keep), optimizer, newborns())
    take_steps(model, optimizer)
    return model, optimizer


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_failing_switch_leaves_everything_as_it_was(k, when, switched, monkeypatch):
    model, optimizer = switched
    before = snapshot(model, optimizer)
    variants = [dict(site.layer.lora_variant) for site in find_sites(model)]
    install, calls = Site.install, []

    def fail(site, **parameters):
        calls.append(site)
        if len(calls) != k or when == "after":
            install(site, **parameters)
        if len(calls) == k:
            raise KeyboardInterrupt("injected")

    monkeypatch.setattr(Site, "install", fail)
    with pytest.raises(KeyboardInterrupt, match="injected"):
        resize(find_sites(model), HARD_SWITCH, optimizer, newborns())
    assert_unchanged(snapshot(model, optimizer), before)
    assert on_or_off(model) == MIXED
    for site, old in zip(find_sites(model), variants, strict=True):
        for name, variant in old.items():
            assert isinstance(variant, DeadVariant) or site.layer.lora_variant[name] is variant
    take_steps(model, optimizer)


@pytest.mark.parametrize("k", range(1, 23))
def test_a_switch_that_fails_in_the_optimizers_state_leaves_everything_as_it_was(k, switched):
    model, optimizer = switched
    before = snapshot(model, optimizer)
    optimizer.state = FailingState(optimizer.state, k)
    with pytest.raises(RuntimeError, match="injected"):
        resize(find_sites(model), HARD_SWITCH, optimizer, newborns())
    assert_unchanged(snapshot(model, optimizer), before)
    optimizer.state.left = 0
    take_steps(model, optimizer)


def test_the_failing_switches_above_reach_the_end_of_the_event(switched):
    model, optimizer = switched
    optimizer.state = FailingState(optimizer.state, 10**6)
    resize(find_sites(model), HARD_SWITCH, optimizer, newborns())
    assert 10**6 - optimizer.state.left == 22
    assert on_or_off(model) == [True, False, True, True, False]
