"""One of two processes dies, comes too late or has another adapter: the other stops and tells."""

import os
import random
import signal
import time
from dataclasses import replace

import peft
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rankflow import surgery
from rankflow.engine import RankFlow
from rankflow.errors import RankFlowError, SurgeryError
from rankflow.specs.budget import BudgetSpec

STEPS = 12
PATIENCE = 3.0  # seconds that a process waits for another
BUDGET = BudgetSpec(rank=1.5, warmup=1, cooldown=1, every=2, recycle=0.9, hysteresis=0.0, protect=0)
EVENTS = (1, 3, 5, 7, 9, 11)
SITES = ("first", "second", "third")
KINDS = ("killed", "delayed", "deciding otherwise", "of other bits", "out of memory")


class Net(nn.Module):
    """Three layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def train(number, trouble):
    """Train in one process of a job, with trouble in the second one before a step is counted."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=list(SITES))
    model = peft.get_peft_model(Net(), config)
    flow = RankFlow(model, BUDGET, STEPS)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(2 * step + number)
        wrapper(torch.randn(4, 6, generator=generator)).square().mean().backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad()
        if number == 1:
            trouble(step, model)
        flow.step(optimizer)


def make_trouble(kind, chance):
    """Return what happens to the second process, and the words that tell of it in the first."""
    when = chance.choice(EVENTS)

    def die(step, model):
        if step == when:
            os.kill(os.getpid(), signal.SIGKILL)

    def wait(step, model):
        if step == when:
            time.sleep(PATIENCE + 4)

    def flip(step, model):
        if step == when:
            resize = surgery.resize

            def unlike(*arguments):
                resize(*arguments)
                trained = [p for p in model.parameters() if p.requires_grad and p.numel()]
                bits = chance.choice(trained).data.view(-1).view(torch.int32)
                bits[chance.randrange(len(bits))] ^= 1 << chance.randrange(20)

            surgery.resize = unlike

    def decide(step, model):
        if step == when:
            resize = surgery.resize

            def otherwise(sites, plan, *rest):
                keep = tuple(kept[:1] for kept in plan.keep)
                births = plan.ranks - [len(kept) for kept in keep]
                resize(sites, replace(plan, keep=keep, births=births), *rest)

            surgery.resize = otherwise

    def run_out(step, model):
        if step == when:

            def fail(*_):
                raise torch.OutOfMemoryError("out of memory")

            surgery.resize = fail

    return {
        "killed": (die, "waited for the other processes"),
        "delayed": (wait, "anks 1 failed to pass monitoredBarrier"),
        "deciding otherwise": (decide, "of process 1 are not those of process 0"),
        "of other bits": (flip, "of process 1 are not those of process 0"),
        "out of memory": (run_out, "failed in process 1, and so in all: OutOfMemoryError"),
    }[kind]


@pytest.mark.fault("one of two processes killed, delayed, or deciding otherwise", quick=5, full=50)
def test_the_other_process_stops_in_time_and_names_the_cause(injection, processes):
    kind = KINDS[injection % len(KINDS)]
    trouble, words = make_trouble(kind, random.Random(injection))
    first, second = processes(2, lambda number: train(number, trouble), patience=PATIENCE)
    assert isinstance(first.error, RankFlowError), first.told
    assert words in str(first.error)
    assert "the reallocation after step" in str(first.error)
    assert first.seconds < PATIENCE + 20
    if kind == "killed":
        assert second == "killed"
    elif kind == "out of memory":
        assert isinstance(second.error, SurgeryError), second.told
        assert "everything is as it was before it" in str(second.error)
    else:
        assert isinstance(second.error, RankFlowError), second.told
    if "of process 1" in words:
        assert any(f"at site {site!r}" in str(first.error) for site in SITES)
