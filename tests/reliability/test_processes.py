"""One of two processes dies, hangs, fails or goes its own way: the other stops, and says why."""

import os
import random
import signal
import time
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rankflow.engine import RankFlow
from rankflow.errors import RankFlowError
from rankflow.specs.budget import BudgetSpec

MOVES = {"warmup": 1, "cooldown": 2, "every": 2, "recycle": 0.9, "hysteresis": 0.0, "protect": 0}
BUDGET = BudgetSpec(**MOVES, rank=1.5)
STEPS, PATIENCE = 12, 2.0
PLACES = ("backward", "observe", "_measure", "_carry_out", "_share_newborns", "_check_agreement")


class Run:
    """A model that trains in one process of the job."""

    def __init__(self):
        torch.manual_seed(0)
        layers = [nn.Linear(6, 8), nn.Linear(8, 10), nn.Linear(10, 4)]
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "1", "2"])
        self.model = peft.get_peft_model(nn.Sequential(*layers), config)
        self.flow = RankFlow(self.model, BUDGET, STEPS)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.02)
        self.wrapper = DistributedDataParallel(self.model)

    def backward(self):
        self.wrapper(torch.randn(4, 6)).square().mean().backward()

    def train(self):
        for _ in range(STEPS):
            self.backward()
            self.flow.observe()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.flow.step(self.optimizer)

    def at(self, place, occasion, act):
        """Act before something is done for the n-th time."""
        owner = self if place == "backward" else self.flow
        do, left = getattr(owner, place), [occasion]

        def done(*arguments, **keywords):
            left[0] -= 1
            if left[0] == 0:
                act()
            return do(*arguments, **keywords)

        setattr(owner, place, done)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(2 * PATIENCE)


def fail():
    raise torch.OutOfMemoryError("no memory is left")


def damage(run, chance):
    """Let parameters, optimizer state, or the plan be others here than elsewhere."""
    what = chance.choice(["parameters", "optimizer", "plan"])
    if what == "plan":
        run.flow._carry_out = another_plan(run.flow)
    for site in run.flow._sites:  # what is damaged at one may be pruned
        if what == "parameters":
            site.A.data += 1e-6
        elif what == "optimizer" and site.A in run.optimizer.state:
            run.optimizer.state[site.A]["exp_avg"] += 1e-6


def another_plan(flow):
    """Carry out a plan that loses a component more."""
    carry_out = type(flow)._carry_out

    def instead(table, plan):
        keep = list(plan.keep)
        index = int(np.argmax([len(kept) for kept in keep]))
        keep[index] = keep[index][1:]
        carry_out(flow, table, replace(plan, keep=tuple(keep)))

    return instead


NAMES = {
    "killed": ("in vain", "by peer"),
    "delayed": ("in vain", "imed out", "by peer"),
    "failing": ("failed in process", "by peer", "in vain"),
    "deciding otherwise": ("left different adapters: at site", "gradients of step"),
}


def inject(kind, seed, processes):
    """Inject one fault into one of two processes, and check how both of them end."""
    chance = random.Random(seed)
    victim = chance.randrange(2)
    place, occasion = chance.choice(PLACES), 1 + chance.randrange(4)

    def work(number):
        run = Run()
        torch.manual_seed(number)
        act = {"killed": die, "delayed": hang, "failing": fail}.get(kind)
        if number == victim and act is not None:
            run.at(place, occasion, act)
        elif number == victim:
            run.at("_measure", occasion, lambda: damage(run, chance))
        run.train()

    ended = processes(2, work, patience=PATIENCE)
    other = ended[1 - victim]
    assert other != "killed"
    assert isinstance(other.error, RankFlowError | RuntimeError), f"{place}: {other}"
    assert any(name in str(other.error) for name in NAMES[kind]), f"{place}: {other.told}"
    assert other.seconds < 10 + 2 * PATIENCE, f"{place}: {other.seconds}"
    assert ended[victim] == "killed" or ended[victim].error is not None


@pytest.mark.fault("one of two processes killed, delayed, or deciding otherwise", quick=8, full=52)
def test_the_other_process_stops_in_time_and_names_the_cause(injection, processes):
    inject(tuple(NAMES)[injection % len(NAMES)], injection, processes)
