"""SIGKILL at a random moment of training or saving."""

import random
import time

import pytest


@pytest.mark.fault("SIGKILL at a random moment of training or saving", quick=4, full=200)
def test_a_killed_run_goes_on_from_its_last_save_to_the_same_bits(injection, run, forked, whole):
    chance = random.Random(injection)
    first = forked(run.train)
    step = chance.randrange(12)
    first.wait_until(lambda: newest(run) >= step)
    saved = newest(run)
    time.sleep(chance.uniform(0, 0.15))  # a step and its save take less
    first.kill()
    first.wait()
    assert run.last_saved() >= saved
    resumed = forked(lambda: run.train(resume=True))
    assert resumed.wait() == 0, resumed.log.read_text()
    assert run.outcome() == whole
    assert not list(run.folder.glob(".*"))


def newest(run):
    """Return the step of the newest checkpoint by its name; 0 if there is none."""
    names = [path.name for path in run.folder.glob("checkpoint-*")]
    return max([int(name.removeprefix("checkpoint-")) for name in names], default=0)
