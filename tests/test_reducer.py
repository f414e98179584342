import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint

from rankflow.engine import RankFlow
from rankflow.errors import RankFlowError
from rankflow.specs.budget import BudgetSpec

MOVES = {"warmup": 1, "cooldown": 1, "every": 2, "recycle": 0.9, "hysteresis": 0.0, "protect": 0}
BUDGET = BudgetSpec(**MOVES, rank=1.5)


class Net(nn.Module):
    """Three layers, the second of them checkpointed."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        x = checkpoint(self.second, torch.tanh(self.first(x)), use_reentrant=False)
        return self.third(torch.tanh(x))


class Run:
    """A model under its engine in one process of a job."""

    def __init__(self, number, *, wrap=DistributedDataParallel):
        torch.manual_seed(0)
        targets = ["first", "second", "third"]
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets)
        self.number = number
        self.model = peft.get_peft_model(Net(), config)
        self.flow = RankFlow(self.model, BUDGET, 10)
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.02)
        self.call = wrap(self.model)

    @property
    def trained(self):
        return [p for p in self.model.parameters() if p.requires_grad and p.numel() > 0]

    def backward(self, step):
        generator = torch.Generator().manual_seed(2 * step + self.number)
        self.call(torch.randn(4, 6, generator=generator)).square().mean().backward()

    def step(self, step):
        self.backward(step)
        self.flow.observe()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self.flow.step(self.optimizer)

    def train(self):
        for step in range(10):
            self.step(step)
        assert len(self.flow.history) == 5
        return [p.detach().clone() for p in self.trained]


def with_hook(hook, state=None):
    def wrap(model):
        wrapper = DistributedDataParallel(model)
        wrapper.register_comm_hook(state, hook)
        return wrapper

    return wrap


def test_the_wrapper_within_whose_forward_a_model_runs_is_found(in_processes):
    """torch calls it private: what it is used for here must go on."""

    def work(number):
        model = nn.Linear(2, 2)
        seen = []
        model.register_forward_pre_hook(
            lambda *_: seen.append(DistributedDataParallel._get_active_ddp_module())
        )
        wrapper = DistributedDataParallel(model)
        wrapper(torch.ones(1, 2))
        model(torch.ones(1, 2))
        return [each is wrapper for each in seen], seen[1]

    assert in_processes(2, work) == [([True, False], None)] * 2


def test_old_parameters_and_reducers_are_let_go(in_processes):
    def work(number):
        run = Run(number)
        run.train()
        held = {id(p) for p in run.call._module_parameters}
        return held == {id(p) for p in run.model.parameters() if p.numel() > 0}

    assert all(in_processes(2, work))


def test_a_job_of_one_process_may_have_a_wrapper_too(in_processes):
    def work(number):
        run = Run(number)
        run.train()
        return [event.ranks for event in run.flow.history]

    (ranks,) = in_processes(1, work)
    assert any(0 in each.values() for each in ranks)


def test_a_job_that_begins_after_the_engine_is_refused(processes):
    def work(number):
        torch.manual_seed(0)
        job = dist.group.WORLD
        dist.group.WORLD = None
        try:
            run = Run(number, wrap=lambda model: model)
        finally:
            dist.group.WORLD = job
        run.step(0)

    for ended in processes(2, work):
        assert isinstance(ended.error, RankFlowError), ended.told
        assert "call torch.distributed.init_process_group first" in str(ended.error)


# Hooks of the user's own


def test_communication_hooks_stay_through_events(in_processes):
    def work(number):
        calls = []

        def hook(state, bucket):
            calls.append(bucket.is_last())
            return default_hooks.allreduce_hook(state, bucket)

        return len(calls), Run(number, wrap=with_hook(hook)).train(), len(calls)

    plain = in_processes(2, lambda number: Run(number).train())
    for (before, weights, after), expected in zip(in_processes(2, work), plain, strict=True):
        assert before == 0
        assert after >= 10
        assert all(map(torch.equal, weights, expected))


def test_hooks_that_compress_keep_processes_equal(in_processes):
    hook = with_hook(default_hooks.fp16_compress_hook)
    first, second = in_processes(2, lambda number: Run(number, wrap=hook).train())
    assert all(map(torch.equal, first, second))


# What is refused


def own_group(model):
    return DistributedDataParallel(model, process_group=dist.new_group(range(2)))


def builtin_hook(model):
    wrapper = DistributedDataParallel(model)
    wrapper._register_builtin_comm_hook(dist.BuiltinCommHookType.FP16_COMPRESS)
    return wrapper


@pytest.mark.parametrize(
    ("wrap", "named"),
    [
        (with_hook(powerSGD_hook, PowerSGDState(None)), "PowerSGD"),
        (builtin_hook, "a built-in communication hook"),
        (own_group, "a process group of its own"),
    ],
    ids=["PowerSGD", "built-in hook", "own group"],
)
def test_options_whose_state_would_not_follow_are_refused(wrap, named, processes):
    for ended in processes(2, lambda number: Run(number, wrap=wrap).train()):
        assert isinstance(ended.error, RankFlowError), ended.told
        assert f"DistributedDataParallel with {named} cannot follow ranks that" in str(ended.error)


def test_uneven_inputs_are_refused(processes):
    def work(number):
        run = Run(number)
        with run.call.join():
            run.train()

    for ended in processes(2, work):
        assert isinstance(ended.error, RankFlowError), ended.told
        assert "with join() cannot follow" in str(ended.error)


# Gradients that differ


def past_the_wrapper(model):
    DistributedDataParallel(model)
    return model


@pytest.mark.parametrize(
    "wrap",
    [lambda model: model, past_the_wrapper, with_hook(noop_hook)],
    ids=["not wrapped", "called past the wrapper", "a hook that averages nothing"],
)
def test_gradients_that_differ_stop_all_processes_in_the_first_step(wrap, processes):
    for ended in processes(2, lambda number: Run(number, wrap=wrap).train()):
        assert isinstance(ended.error, RankFlowError), ended.told
        assert "the gradients of step 1 differ between processes" in str(ended.error)
        assert "first at site 'first', where those of process 1" in str(ended.error)


def test_they_do_in_the_first_step_after_any_event_the_last_one_too(processes):
    def work(number):
        run = Run(number)
        for step in range(9):
            run.step(step)
        run.call = run.model
        run.step(9)

    for ended in processes(2, work):
        assert isinstance(ended.error, RankFlowError), ended.told
        assert "the gradients of step 10 differ between processes" in str(ended.error)


def test_gradients_that_are_averaged_by_hand_will_do(in_processes):
    """They were noted before that, so clipping is not undone: a factor of 1, not a local one."""

    def work(number):
        run = Run(number, wrap=lambda model: model)
        seen = []
        run.flow._observers.tracker.observe = lambda unclip, accept: seen.append(unclip.item())
        run.backward(0)
        for parameter in run.trained:
            dist.all_reduce(parameter.grad)
            parameter.grad /= 2
        run.flow.observe()
        return seen

    assert in_processes(2, work) == [[1.0]] * 2


# The factor of clipping


@pytest.mark.parametrize("static_graph", [False, True], ids=["plain", "static graph"])
@pytest.mark.parametrize("micro", [1, 3])
def test_what_clipping_took_is_read_after_averaging(micro, static_graph, in_processes):
    def work(number):
        def wrap(model):
            return DistributedDataParallel(model, static_graph=static_graph)

        run = Run(number, wrap=wrap)
        factors = []
        for step in range(6):
            for part in range(micro):
                waits = part < micro - 1 and (step > 0 or not static_graph)
                run.call.require_backward_grad_sync = not waits
                run.backward(10 * step + part)
            norm = clip_grad_norm_(run.trained, 0.001)
            left = torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in run.trained]))
            reading = run.flow._observers.gradients.read()
            factors.append((reading.unclip.item(), (norm / left).item()))
            run.flow.observe()
            run.optimizer.step()
            run.optimizer.zero_grad()
            run.flow.step(run.optimizer)
        return factors

    for factors in in_processes(2, work):
        for found, true in factors:
            assert true > 2
            assert found == pytest.approx(true, rel=1e-4)
