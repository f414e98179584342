"""What cannot be steered under FSDP2, and other engines, is refused where it is attached."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from rankflow.errors import BudgetError, RankFlowError, SurgeryError


@pytest.fixture
def refused(in_processes):
    """Attach an engine in two processes, and return what the first is told."""

    def run(work, error=RankFlowError):
        def attach(number):
            with pytest.raises(error) as raised:
                work()
            return str(raised.value)

        first, second = in_processes(2, attach)
        assert first == second
        return first

    return run


@pytest.mark.parametrize(
    ("budget", "told"),
    [
        ({"score": "norm"}, "score = 'norm' needs whole factors: use one of taylor"),
        ({"score": "frobenius"}, "score = 'frobenius'"),
        ({"score": "sensitivity"}, "score = 'sensitivity'"),
        ({"components": "gated"}, "components = 'gated': use 'factors'"),
        ({"components": "gated", "dem": 0.1}, "dem = 0.1: use 0"),
        ({"magnitude": "budgeted"}, "magnitude = 'budgeted': use 'always'"),
        ({"magnitude": "never"}, "magnitude = 'never': use 'always', or plain LoRA"),
        ({"renormalise": "keep-scale"}, "renormalise = 'keep-scale': use 'none'"),
    ],
)
def test_budgets_that_need_whole_tensors_name_the_key(budget, told, job, refused):
    run = job(budget=budget)
    assert told in refused(lambda: run.flow(run.model()))


@pytest.mark.parametrize(
    ("budget", "r", "needed"),
    [
        ({"rank": 5.5, "max_rank": None}, 5, 6),
        ({"bounds": {"blocks.0.q": {"max_rank": 6}}}, 5, 6),
        ({"rank": 3.5, "schedule": "linear", "start": 0.5, "max_rank": None}, 3, 4),
    ],
    ids=["start", "bounds", "target"],
)
def test_a_budget_beyond_the_capacity_is_told_the_r_that_it_needs(budget, r, needed, job, refused):
    run = job(budget=budget, config={"r": r})
    told = refused(lambda: run.flow(run.model()), BudgetError)
    assert f"LoraConfig(r={needed})" in told


def test_dora_in_parts_is_refused(job, refused):
    run = job(config={"use_dora": True}, leaves=True)
    assert "not within it" in refused(lambda: run.flow(run.model()))


def test_offloaded_parameters_are_refused(job, refused):
    run = job(sharding={"offload_policy": CPUOffloadPolicy(pin_memory=False)})
    told = []

    def work():
        model = run.model()
        for parameter in model.parameters():  # a CPU offloads to itself
            parameter.device_mesh._device_type = "cuda"
        told.append(run.flow(model))

    assert "leave offload_policy out" in refused(work)


def test_parameters_that_are_sharded_over_some_processes_are_refused(job, refused):
    def work():
        run = job(sharding={"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))})
        run.flow(run.model())

    assert "a mesh of one dimension" in refused(work)


def test_adapters_that_are_left_whole_are_refused(job, refused):
    def work():
        run = job()
        model = run.model_of(shard=False)
        adapter = {p for n, p in model.named_parameters() if "lora_" in n}
        fully_shard(model, ignored_params=adapter)
        run.flow(model)

    assert "without ignored_params" in refused(work)


def test_tensor_parallelism_is_refused(job, refused):
    def work():
        run = job()
        model = run.model_of(shard=False)
        head = model.get_base_model().head
        mesh = init_device_mesh("cpu", (2,))
        head.weight = nn.Parameter(distribute_tensor(head.weight, mesh, [Shard(0)]))
        run.flow(model)

    assert "tensor parallelism (base_model.model.head.weight)" in refused(work)


def test_flat_parameters_are_refused(job, refused):
    def work():
        run = job()
        model = run.model_of(shard=False)
        block = model.get_base_model().blocks
        block[0] = FullyShardedDataParallel(
            block[0], device_id=torch.device("cpu"), use_orig_params=True
        )
        run.flow(model)

    assert "FSDP1" in refused(work)


def test_deepspeed_is_refused(job):
    run = job()
    model = run.model()
    next(model.parameters()).ds_id = 0
    with pytest.raises(RankFlowError, match="DeepSpeed ZeRO-3"):
        run.flow(model)


def test_an_optimizer_made_before_the_shards_is_refused(job, refused):
    def work():
        run = job()
        model = run.model_of(shard=False)
        optimizer = run.make_optimizer(model)
        run.shard(model)
        run.flow(model).attach(optimizer)

    assert "build it from the model's trainable parameters" in refused(work, SurgeryError)


def test_a_refusal_leaves_the_model_as_it_was(job, in_processes):
    run = job(budget={"score": "norm"})

    def work(number):
        model = run.model()
        before = run.outputs(model)
        with pytest.raises(RankFlowError):
            run.flow(model)
        assert torch.equal(run.outputs(model), before)
        return job().flow(model).ranks

    first, second = in_processes(2, work)
    assert first == second
