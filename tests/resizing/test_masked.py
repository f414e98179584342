"""Ranks under FSDP2: decisions as with tensors of other shapes, and zeros where nothing lives."""

import copy

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor.debug import CommDebugMode
from torch.optim import SGD, Adam

import rankflow as rf
from rankflow.adapters import norm_cache
from rankflow.adapters.slots import local
from rankflow.allocation.policies import plan_from_ranks
from rankflow.allocation.scheduler import Scheduler
from rankflow.checkpoint import load_state, save_state
from rankflow.errors import CheckpointError, ExportError, RankFlowError, SurgeryError
from rankflow.resizing import mask_surgery

QUICK = {
    "plain": {},
    "accumulated and clipped": {
        "accumulate": 2,
        "clip": 0.01,
        "budget": {"grow": "orthogonal", "recycle": 0.4},
    },
    "dora": {"config": {"use_dora": True}, "budget": {"rank": 2.5}},
}
LONG = {
    "dora, accumulated, clipped, evaluated": {
        "config": {"use_dora": True},
        "budget": {"rank": 3, "schedule": "linear", "start": 1.3},
        "accumulate": 2,
        "clip": 0.01,
        "evaluate": True,
    },
    "every leaf a unit": {"leaves": True},
    "evaluated between the steps": {"evaluate": True},
    "momentum": {
        "optimizer": SGD,
        "options": {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.01},
        "budget": {"score": "fisher", "recycle": 0.3},
    },
    "random": {"budget": {"score": "random", "grow": "random", "policy": "random"}},
    "amsgrad, foreach": {
        "optimizer": Adam,
        "options": {"lr": 3e-2, "amsgrad": True, "foreach": True, "weight_decay": 0.1},
    },
    "fused": {"options": {"lr": 3e-2, "fused": True, "weight_decay": 0.1}},
    "falling": {"budget": {"schedule": "cubic", "start": 2.0}},
}


def facts(flow):
    """What is the same in all processes, and in one."""
    return [
        (
            event.step,
            event.ranks,
            event.spent,
            event.limit,
            [(c.site, c.component) for c in event.pruned],
            [(c.site, c.component) for c in event.born],
        )
        for event in flow.history
    ]


def check_zeros(flow, optimizer):
    """Check that what holds no component is zero, in values and in moments."""
    for site in flow._sites:
        dead = sorted(set(range(site.slots.capacity)) - set(site.slots.live))
        for tensor, axis in mask_surgery._tensors(site.slots, optimizer):
            whole = tensor.detach().full_tensor().movedim(axis, 0)
            assert not whole[dead].any(), site.name
    spent = [
        len(site.slots.live) * (site.in_features + site.out_features)
        + (0 if site.magnitude is None else site.out_features)
        for site in flow._sites
    ]
    assert flow.spent == sum(spent)


def compare(job, in_processes, options, count=2):
    run = job(**options)
    losses, flow = run.train()

    def work(number):
        losses, flow = run.train(after_step=check_zeros)
        importance = [list(event.importance.values()) for event in flow.history]
        return losses, facts(flow), importance

    for sharded, events, importance in in_processes(count, work):
        assert events == facts(flow)
        np.testing.assert_allclose(sharded, losses, rtol=0, atol=2e-6)
        expected = [list(event.importance.values()) for event in flow.history]
        np.testing.assert_allclose(importance, expected, rtol=2e-4)
    return flow


@pytest.mark.parametrize("options", QUICK.values(), ids=QUICK.keys())
def test_two_processes_decide_and_learn_as_one_with_tensors_of_other_shapes(
    options, job, in_processes
):
    flow = compare(job, in_processes, options)
    assert any(event.born for event in flow.history)
    assert any(event.pruned for event in flow.history)


@pytest.mark.distributed
@pytest.mark.parametrize("options", LONG.values(), ids=LONG.keys())
def test_every_optimizer_and_score_stays_equal(options, job, in_processes):
    compare(job, in_processes, options)


def test_sites_die_and_return(job, in_processes, monkeypatch):
    def plan(scheduler, table, step):
        ranks = np.full(len(table.sites), 2)
        ranks[2:4] = (0, 3) if (step // 4) % 2 else (2, 1)  # blocks.0.v and blocks.0.o
        return plan_from_ranks(table, ranks)

    monkeypatch.setattr(Scheduler, "plan", plan)
    flow = compare(job, in_processes, {"steps": 40})
    assert [event.ranks["blocks.0.v"] for event in flow.history][:4] == [0, 2, 0, 2]


@pytest.mark.distributed
def test_what_was_gathered_for_an_evaluation_is_not_used_after_an_event(
    job, in_processes, monkeypatch
):
    def plan(scheduler, table, step):
        ranks = np.full(len(table.sites), 2)
        ranks[0] = 1 + (step // 4) % 2  # the embedding, which FSDP2 leaves gathered in the root
        return plan_from_ranks(table, ranks)

    monkeypatch.setattr(Scheduler, "plan", plan)
    flow = compare(job, in_processes, {"steps": 40, "evaluate": True})
    assert {event.ranks["embed"] for event in flow.history} == {1, 2}


@pytest.mark.distributed
def test_norms_of_dora_follow_weights_that_no_optimizer_changed(job, in_processes, monkeypatch):
    # An allocator may give what is gathered anew the address that it had before.
    monkeypatch.setattr(norm_cache, "_identity", lambda tensor: None)
    run = job(config={"use_dora": True}, budget={"rank": 3})

    def work(number):
        model = run.model()
        run.flow(model)
        change(model, 1.0)
        run.outputs(model)
        change(model, 2.0)
        return run.outputs(model)

    def change(model, size):
        for name, parameter in model.named_parameters():
            if ".lora_B" in name:
                local(parameter).fill_(size)

    outputs, _ = in_processes(2, work)
    monkeypatch.undo()
    whole = run.model()
    run.flow(whole)
    change(whole, 2.0)
    torch.testing.assert_close(run.outputs(whole), outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.distributed
def test_a_process_may_hold_no_slot_at_all(job, in_processes):
    """Five slots on four processes are 2, 2, 1 and none."""
    compare(job, in_processes, {}, count=4)


@pytest.mark.distributed
def test_low_precision_keeps_dead_slots_at_zero(job, in_processes):
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    run = job(sharding={"mp_policy": policy})

    def work(number):
        losses, flow = run.train(after_step=check_zeros)
        return losses, facts(flow)

    (losses, first), (_, second) = in_processes(2, work)
    assert first == second
    assert np.isfinite(losses).all()


def test_a_step_takes_no_collective_of_its_own(job, in_processes):
    run = job(steps=8, budget={"warmup": 6, "every": 1, "cooldown": 1})

    def work(number):
        model = run.model()
        flow, optimizer = run.flow(model), run.make_optimizer(model)
        counts = {}
        for name in ("observe", "step"):
            setattr(flow, name, counted(getattr(flow, name), name, counts))
        for batch in run.batches():
            run.step(model, flow, optimizer, batch)
        return counts, len(flow.history)

    for counts, events in in_processes(2, work):
        assert counts["observe"] == [0] * 8
        assert [count > 0 for count in counts["step"]] == [False] * 5 + [True] * 2 + [False]
        assert events == 2


def counted(call, name, counts):
    """Note how many collectives each call takes."""

    def run(*arguments):
        with CommDebugMode() as noted:
            result = call(*arguments)
        counts.setdefault(name, []).append(noted.get_total_counts())
        return result

    return run


@pytest.mark.parametrize("use_dora", [False, True])
def test_an_export_is_a_stock_adapter_of_the_live_components_alone(
    use_dora, job, in_processes, tmp_path
):
    bounds = {"blocks.0.v": {"max_rank": 0}}
    config = {"modules_to_save": ["head"], "use_dora": use_dora}
    run = job(config=config, budget={"bounds": bounds, "rank": 2 + use_dora})

    def work(number):
        _, flow = run.train()
        with pytest.raises(ExportError, match="format 'merged' needs the whole base model"):
            rf.export_adapter(flow.model, tmp_path / "merged", format="merged")
        rf.export_adapter(flow.model, tmp_path / "adapter", facts=flow.facts())
        return run.outputs(flow.model), flow.ranks, flow.spent

    (outputs, ranks, spent), _ = in_processes(2, work)
    loaded = peft.PeftModel.from_pretrained(run.base(), tmp_path / "adapter")
    torch.testing.assert_close(run.outputs(loaded), outputs, rtol=1e-6, atol=1e-6)
    shapes = {n: p.shape for n, p in loaded.named_parameters() if ".lora_" in n}
    stand_in = 6 + 9 if use_dora else 0  # PEFT wants a component beside a magnitude
    assert sum(shape.numel() for shape in shapes.values()) == spent + stand_in
    assert ranks["blocks.0.v"] == 0


def test_an_event_that_fails_in_one_process_leaves_all_as_they_were(job, in_processes):
    run = job(steps=16)

    def work(number):
        model = run.model()
        flow, optimizer = run.flow(model), run.make_optimizer(model)
        kept = {}

        def keep(*_):
            kept["before"] = [part.clone() for part in mask_surgery.held(flow._sites, optimizer)]

        optimizer.register_step_post_hook(keep)
        live, batches = [list(s.slots.live) for s in flow._sites], run.batches()
        fair_start = flow._observers.fair_start
        follow = fair_start.follow
        fair_start.follow = _fail if number == 1 else follow  # values are written by then

        def go_on():
            for batch in batches:
                run.step(model, flow, optimizer, batch)

        with pytest.raises((RankFlowError, SurgeryError), match="64 GiB"):
            go_on()
        after = [part.clone() for part in mask_surgery.held(flow._sites, optimizer)]
        assert all(torch.equal(a, b) for a, b in zip(kept["before"], after, strict=True))
        assert [s.slots.live for s in flow._sites] == live
        assert flow.history == []
        fair_start.follow = follow
        go_on()
        check_zeros(flow, optimizer)
        return len(flow.history), flow.ranks

    first, second = in_processes(2, work)
    assert first == second
    assert first[0] > 0


def _fail(*arguments):
    raise MemoryError("64 GiB")


def test_a_resumed_run_is_bitwise_the_one_that_went_on(job, in_processes, tmp_path):
    run = job()

    def work(number):
        model = run.model()
        flow, optimizer = run.flow(model), run.make_optimizer(model)
        losses, batches = [], list(run.batches())
        for batch in batches[:11]:
            run.step(model, flow, optimizer, batch)
        state = flow.state_dict()  # all processes take part, and one may save it
        if number == 0:
            save_state(state, tmp_path)
        dist.barrier()
        again = run.model()
        resumed = run.flow(again, resume=load_state(tmp_path))
        for parameter, saved in zip(again.parameters(), model.parameters(), strict=True):
            local(parameter).copy_(local(saved))
        other = run.make_optimizer(again)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        resumed.attach(other)
        for batch in batches[11:]:
            first = run.step(model, flow, optimizer, batch)
            losses.append((first, run.step(again, resumed, other, batch)))
        return losses, facts(flow), facts(resumed)

    for losses, events, resumed in in_processes(2, work):
        assert all(a == b for a, b in losses)
        assert resumed == events
        assert len(events) > 3


def test_states_of_one_engine_are_refused_by_the_other(job, in_processes):
    run = job()
    whole = run.flow(run.model()).state_dict()

    def work(number):
        flow = run.flow(run.model())
        with pytest.raises(CheckpointError, match="of a run without FSDP2"):
            flow.load_state_dict(whole)
        return flow.state_dict()

    sharded = in_processes(2, work)[0]
    with pytest.raises(CheckpointError, match="of a run under FSDP2"):
        run.flow(run.model()).load_state_dict(sharded)
