"""Young components corrected by the kernel, against the equations in float64 and against torch."""

import pytest
import torch
from torch import nn

from rankflow import fairstart
from rankflow.adapters.gating import convert
from rankflow.adapters.sites import find_sites
from rankflow.fairstart import YOUTH, FairStart

# Steps lived of each component, site by site: runs of several ages, and a site without young ones.
LIVED = [
    [YOUTH, 2, 2, 0],
    [YOUTH] * 4,
    [29, YOUTH, 7, 7],
    [0, 0, 0, 0],
    [YOUTH, YOUTH, YOUTH, 12],
]
MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class Case:
    """A net of every kind of layer in training, with moments of any size."""

    def __init__(self, model, *, taken=1, lived=LIVED, gated=False, **options):
        torch.manual_seed(3)
        self.sites = find_sites(model)
        if gated:
            convert(self.sites, "gated")
        self.factors = [(p, axis, i) for i, s in enumerate(self.sites) for p, axis in s.factors]
        self.optimizer = torch.optim.AdamW([p for p, *_ in self.factors], lr=0.01, **options)
        self.betas = self.optimizer.defaults["betas"]
        self.taken = taken
        for _ in range(taken):
            self.draw_gradients()
            self.optimizer.step()
        self.draw_gradients()
        for parameter, *_ in self.factors:
            state = self.optimizer.state.get(parameter, {})
            for key in set(MOMENTS) & set(state):
                fresh = torch.randn(parameter.shape).to(state[key])
                state[key].copy_(fresh if key == "exp_avg" else fresh.square())
        self.fair = FairStart(self.sites)
        self.fair.resume(lived)
        self.fair.attach(self.optimizer)

    def draw_gradients(self):
        for parameter, *_ in self.factors:
            parameter.grad = torch.randn(parameter.shape).to(parameter)

    def held(self):
        """The gradient and the moments of each factor, now."""
        return [
            {"gradient": p.grad.clone()}
            | {k: v.clone() for k, v in self.optimizer.state.get(p, {}).items() if k in MOMENTS}
            for p, *_ in self.factors
        ]

    def corrected(self):
        """The same as the optimizer's next step will find it, which is then taken."""
        found = []
        hook = self.optimizer.register_step_pre_hook(lambda *_: found.append(self.held()))
        self.optimizer.step()
        hook.remove()
        return found[0]


def by_the_equations(case, lived):
    """What is held now, corrected component by component in float64."""

    def ratio(beta, shared, own):
        return 1.0 if own == 0 else (1 - beta**shared) / (1 - beta**own)

    beta1, beta2 = case.betas
    t = case.taken + 1
    expected = [{key: x.double() for key, x in held.items()} for held in case.held()]
    for held, (_, axis, i) in zip(expected, case.factors, strict=True):
        for component, steps in enumerate(lived[i]):
            if steps >= YOUTH:
                continue
            k = steps + 1
            alpha, gamma = ratio(beta1, t, k), ratio(beta2, t, k)
            part = {key: x.select(axis, component) for key, x in held.items()}
            for key in set(MOMENTS[1:]) & set(part):
                part[key] *= gamma / ratio(beta2, t - 1, k - 1)
            if beta2 > 0:
                seen = (alpha * part["gradient"]).square()
                # Adam will add beta2 V + (1 - beta2) seen, and that shall be gamma_k v_k.
                own = gamma * (1 - beta2) * part["gradient"].square()
                part["exp_avg_sq"] += (own - (1 - beta2) * seen) / beta2
            part["exp_avg"] *= alpha / ratio(beta1, t - 1, k - 1)
            part["gradient"] *= alpha
    return expected


def assert_near(found, expected, rtol, atol):
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            torch.testing.assert_close(
                mine[key].double(), value.double(), rtol=rtol, atol=atol, msg=key
            )


@pytest.fixture
def by_torch(monkeypatch):
    """A list that grows by an entry for each slice that torch corrects."""
    slices = []
    rescale = fairstart.rescale_young

    def note(gradient, *arguments, **options):
        slices.append(gradient.shape)
        rescale(gradient, *arguments, **options)

    monkeypatch.setattr(fairstart, "rescale_young", note)
    return slices


@pytest.fixture
def torch_must_not(by_torch):
    """See that the kernel does it all."""
    yield
    assert by_torch == []


@pytest.fixture
def options_of(device, monkeypatch):
    """Make options with which the optimizer counts its steps there."""

    def make(count):
        if count == "host":
            return {}
        # A fused optimizer counts on a GPU, and nobody waits for it; a CPU has to be told.
        monkeypatch.setattr(fairstart, "_count", lambda step: step)
        return {"fused": True}

    return make


@pytest.mark.parametrize("count", ["host", "device"])
@pytest.mark.parametrize("taken", [1, 2, 40])
@pytest.mark.parametrize(
    "options",
    [{}, {"amsgrad": True}, {"betas": (0.0, 0.99)}, {"betas": (0.9, 0.0)}, {"gated": True}],
    ids=str,
)
@pytest.mark.usefixtures("torch_must_not")
def test_it_is_that_of_the_equations(options, taken, count, device, options_of, mixed):
    model = mixed(r=4).to(device)
    case = Case(model, taken=taken, **options, **options_of(count))
    expected = by_the_equations(case, LIVED)
    assert_near(case.corrected(), expected, rtol=5e-6, atol=5e-6)
    aged = [[min(steps + 1, YOUTH) for steps in site] for site in LIVED]
    assert case.fair.lived() == aged
    # And once more, when some have grown up.
    case.taken += 1
    case.draw_gradients()
    expected = by_the_equations(case, aged)
    assert_near(case.corrected(), expected, rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("torch_must_not")
def test_numbers_of_half_the_size_are_rounded_once(dtype, device, mixed):
    case = Case(mixed(r=4).to(device, dtype), taken=40)
    expected = by_the_equations(case, LIVED)
    # An interpreter cuts off where a GPU rounds.
    assert_near(case.corrected(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"gated": True}], ids=str)
def test_it_is_that_of_torch(options, device, mixed, by_torch, monkeypatch):
    paths = []
    for switch in ("1", "0"):
        monkeypatch.setenv("RANKFLOW_TRITON", switch)
        torch.manual_seed(1)
        case = Case(mixed(r=4).to(device), taken=40, **options)
        paths.append([])
        for _ in range(YOUTH):
            paths[-1].append(case.corrected())
            case.draw_gradients()
        assert bool(by_torch) == (switch == "0")
        assert case.fair.lived() == [[YOUTH] * 4] * 5
    for mine, theirs in zip(*paths, strict=True):
        assert_near(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", ["host", "device"])
@pytest.mark.usefixtures("torch_must_not")
def test_a_newborn_takes_the_steps_of_a_fresh_optimizer(count, adapt, device, options_of):
    host = nn.ModuleDict({"layer": nn.Linear(7, 8)})
    case = Case(adapt(host, r=3).to(device), taken=2, lived=[[YOUTH] * 3], **options_of(count))
    site = case.sites[0]
    for parameter, axis, _ in case.factors:  # as an event leaves them
        for key in ("exp_avg", "exp_avg_sq"):
            case.optimizer.state[parameter][key].select(axis, 2).zero_()
    case.fair.resume([[YOUTH, YOUTH, 0]])
    fresh = nn.Parameter(site.A.detach()[2].clone())
    other = torch.optim.AdamW([fresh], lr=0.01)
    for _ in range(YOUTH):
        before = site.A.detach()[2].clone(), fresh.detach().clone()
        fresh.grad = site.A.grad[2].clone()
        case.optimizer.step()
        other.step()
        moved, expected = site.A.detach()[2] - before[0], fresh.detach() - before[1]
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
        case.draw_gradients()


@pytest.mark.usefixtures("torch_must_not")
def test_a_factor_may_take_many_blocks(adapt, device):
    host = nn.ModuleDict({"layer": nn.Linear(3001, 2777)})
    lived = [[YOUTH, 3, 3, 3, YOUTH, 0, YOUTH]]
    case = Case(adapt(host, r=7).to(device), taken=12, lived=lived)
    expected = by_the_equations(case, lived)
    assert_near(case.corrected(), expected, rtol=5e-6, atol=5e-6)


@pytest.mark.usefixtures("torch_must_not")
def test_before_adams_first_step_there_is_nothing_to_correct(device, mixed):
    case = Case(mixed(r=4).to(device), taken=0, lived=[[0] * 4] * 5)
    before = case.held()
    assert_near(case.corrected(), before, rtol=0, atol=0)
    assert case.fair.lived() == [[1] * 4] * 5
    case.draw_gradients()
    before = case.held()  # shared and own count are the same
    assert_near(case.corrected(), before, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("torch_must_not")
def test_a_factor_without_a_gradient_is_left_alone_and_its_site_not_counted(device, mixed):
    case = Case(mixed(r=4).to(device), taken=12)
    silent = case.sites[0]
    silent.A.grad = silent.B.grad = case.sites[3].A.grad = None
    moments = [case.optimizer.state[p]["exp_avg_sq"] for p in (silent.A, case.sites[3].A)]
    before = [square.clone() for square in moments]
    case.optimizer.step()
    assert all(map(torch.equal, moments, before))
    assert case.fair.lived()[0] == LIVED[0]
    assert case.fair.lived()[3] == [1] * 4


def test_a_step_brings_only_numbers_to_the_device_if_no_tensor_has_moved(
    device, mixed, monkeypatch
):
    from rankflow.adapters.kernels import addresses, young

    case = Case(mixed(r=4).to(device), lived=[[3] * 4] * 5)
    uploads = []
    for module in (addresses, young):
        upload = module.upload
        monkeypatch.setattr(
            module, "upload", lambda x, to, f=upload: uploads.append(x.dtype) or f(x, to)
        )
    case.optimizer.step()
    uploads.clear()
    case.optimizer.step()
    assert uploads == [torch.float32]
    uploads.clear()
    held, case.sites[0].A.grad = case.sites[0].A.grad, torch.zeros_like(case.sites[0].A)
    case.optimizer.step()
    assert sorted(uploads, key=str) == [torch.float32, torch.int64]
    assert held is not None


# --- where torch has to


def across(tensor):
    """The same numbers in another layout."""
    return tensor.T.contiguous().T


SPOILS = {
    "gradient across": lambda p, state: setattr(p, "grad", across(p.grad)),
    "moment across": lambda p, state: state.update(exp_avg=across(state["exp_avg"])),
    "another type": lambda p, state: state.update(exp_avg_sq=state["exp_avg_sq"].bfloat16()),
}


@pytest.mark.parametrize("spoil", SPOILS.values(), ids=SPOILS)
def test_torch_does_what_the_table_does_not_tell(spoil, device, options_of, mixed, by_torch):
    case = Case(mixed(r=4).to(device), taken=12, **options_of("device"))
    parameter = case.sites[2].A
    spoil(parameter, case.optimizer.state[parameter])
    expected = by_the_equations(case, LIVED)
    case.fair._before_step(case.optimizer, (), {})  # Adam itself does not take all of these
    assert_near(case.held(), expected, rtol=1e-2, atol=1e-2)
    assert by_torch


def test_torch_reads_a_count_of_another_type(device, options_of, mixed, by_torch):
    case = Case(mixed(r=4).to(device), **options_of("device"))
    state = case.optimizer.state[case.sites[2].A]
    state["step"] = state["step"].bfloat16()
    case.fair._before_step(case.optimizer, (), {})
    assert by_torch


def test_torch_does_float64(device, mixed, by_torch):
    case = Case(mixed(r=4).to(device).double(), taken=12)
    expected = by_the_equations(case, LIVED)
    assert_near(case.corrected(), expected, rtol=1e-12, atol=1e-12)
    assert by_torch


def test_torch_does_what_a_gradient_scaler_leaves_to_the_optimizer(device, mixed, by_torch):
    """And after that, too, until an event: the host does not know the steps that were skipped."""
    lived = [[3] * 4] * 5
    case = Case(mixed(r=4).to(device), taken=12, lived=lived, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=2.0)
    scaler.scale(torch.zeros((), device=device))  # a scaler makes its state at first use
    case.sites[0].A.grad[0, 0] = float("inf")
    before = case.held()
    scaler.step(case.optimizer)
    scaler.update()
    after = case.held()
    for held in (*before, *after):
        del held["gradient"]
    assert_near(after, before, rtol=0, atol=0)
    assert case.fair.lived() == lived
    by_torch.clear()
    case.draw_gradients()
    expected = by_the_equations(case, lived)
    assert_near(case.corrected(), expected, rtol=1e-4, atol=1e-4)
    assert by_torch
    by_torch.clear()
    case.fair.resume(case.fair.lived())
    case.draw_gradients()
    case.optimizer.step()
    assert by_torch == []


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16"])
def test_the_kernel_compiles_for_gpus_that_are_not_here(kind, absent_gpu, compile_for):
    triton = pytest.importorskip("triton")
    from rankflow.adapters.kernels.young import _correct

    signature = {"blocks": "*i64", "slices": "*i64", "addresses": "*i64", "numbers": "*fp32"}
    constants = {"TYPE": getattr(triton.language, kind), "BLOCK": 1024}
    compiled = compile_for(absent_gpu, _correct, signature, constants)
    assert compiled.metadata.shared <= 64 * 2**10
