import copy
import gc
import time
import weakref

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from rankflow.ablation.measures.latency import measure_latency
from rankflow.ablation.methods.method import Built

BATCH = {"inputs": torch.ones(2, 3)}


class Slow(nn.Module):
    """A model that takes as long as it is told, and a minute in the wrong mode."""

    def __init__(self, seconds, log=None):
        super().__init__()
        self.seconds = list(seconds)
        self.log = [] if log is None else log
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, inputs):
        assert not self.training
        assert not torch.is_grad_enabled()
        assert inputs.shape == (2, 3)
        self.log.append(self)
        time.sleep(self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0])
        return inputs * self.weight


def test_each_model_gets_its_own_median():
    base, unmerged, merged = Slow([0.002]), Slow([0.03]), Slow([0.015])
    latency = measure_latency(base, Built(unmerged, merge=lambda: merged), BATCH, rounds=3)
    assert 0.002 <= latency.base < 0.012
    assert 0.03 <= latency.unmerged < 0.06
    assert 0.015 <= latency.merged < 0.03


def test_the_first_rounds_and_the_odd_slow_one_do_not_count():
    unmerged = Slow([0.2, 0.2, 0.001, 0.2, 0.001])
    assert measure_latency(Slow([0]), Built(unmerged), BATCH, rounds=3).unmerged < 0.1


def test_models_take_turns():
    log = []
    base, unmerged, merged = (Slow([0], log) for _ in range(3))
    measure_latency(base, Built(unmerged, merge=lambda: merged), BATCH, rounds=4)
    assert len(log) >= 3 * 4
    assert log == [base, unmerged, merged] * (len(log) // 3)


def test_what_cannot_merge_has_no_merged_latency():
    assert measure_latency(Slow([0]), Built(Slow([0])), BATCH, rounds=1).merged is None


def test_the_merged_copy_is_gone_and_the_modes_are_back():
    copies = []

    def merge():
        copy = Slow([0])
        copies.append(weakref.ref(copy))
        return copy

    base, unmerged = Slow([0]).eval(), Slow([0]).train()
    measure_latency(base, Built(unmerged, merge=merge), BATCH, rounds=1)
    gc.collect()
    assert [copy() for copy in copies] == [None]
    assert (base.training, unmerged.training) == (False, True)


def test_the_callers_precision_counts_and_not_a_trainers():
    class Watched(Slow):
        def forward(self, inputs):
            precisions.append(torch.is_autocast_enabled("cpu"))
            return super().forward(inputs)

    precisions = []
    unmerged = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(Watched([0]))
    built = Built(unmerged, merge=lambda: copy.deepcopy(unmerged))
    measure_latency(Watched([0]), built, BATCH, rounds=1)
    assert set(precisions) == {False}
    precisions.clear()
    with torch.autocast("cpu", torch.bfloat16):
        measure_latency(Watched([0]), built, BATCH, rounds=1)
    assert set(precisions) == {True}


@pytest.mark.gpu
def test_the_clock_waits_for_the_device():
    wide = nn.Linear(8192, 8192, device="cuda", bias=False)
    batch = {"input": torch.ones(8192, 8192)}
    latency = measure_latency(wide, Built(wide), batch, rounds=3)
    assert latency.base > 2 * 8192**3 / 2e14  # no device of today is as fast in float32
