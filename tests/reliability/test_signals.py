"""SIGTERM and SIGINT at a random moment of a whole run, before and after training too."""

import random
import signal
import time

import pytest


@pytest.mark.fault("SIGTERM or SIGINT at a random moment", quick=4, full=50)
def test_a_signalled_run_exits_with_its_code_and_goes_on_to_the_same_bits(
    injection, run, forked, whole
):
    chance = random.Random(injection)
    number = (signal.SIGTERM, signal.SIGINT)[injection % 2]
    first = forked(run.train)
    # Its first line is there: signals are handled from now on.
    first.wait_until(lambda: first.log.is_file() and "data " in first.log.read_text())
    time.sleep(chance.uniform(0, 4))
    first.kill(number)
    code = first.wait()
    told = first.log.read_text()
    assert code in (128 + number, 0), told  # 0: the run had ended
    if "saved after step" in told:
        step = int(told.rpartition("saved after step ")[2].split()[0])
        assert run.last_saved() == step
    resumed = forked(lambda: run.train(resume=True))
    assert resumed.wait() == 0, resumed.log.read_text()
    assert run.outcome() == whole
