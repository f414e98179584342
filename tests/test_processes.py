import time

import numpy as np
import pytest
import torch
import torch.distributed as dist

from rankflow import processes as job
from rankflow.errors import RankFlowError


def test_one_process_has_nothing_to_tell():
    tensor = torch.ones(2)
    job.average([tensor], "this")
    job.wait_for_all("this")
    assert not job.are_several()
    assert job.is_first()
    assert job.gather(3, "this") == [3]
    assert job.from_first("plan", "this") == "plan"
    assert job.in_all(lambda: 4, "this") == 4
    assert torch.equal(tensor, torch.ones(2))


def test_what_several_tell_each_other(in_processes):
    def work(number):
        mean, copy = torch.full((3,), float(number)), torch.full((2,), number)
        job.average([mean], "this")
        job.tensors_from_first([copy], "this")
        plan = job.from_first(np.array([number, 7.5]), "this")
        return job.is_first(), mean.tolist(), copy.tolist(), plan.tolist(), job.gather(number, "it")

    ended = in_processes(3, work)
    assert [each[0] for each in ended] == [True, False, False]
    assert [each[1:] for each in ended] == [([1.0] * 3, [0, 0], [0.0, 7.5], [0, 1, 2])] * 3


def test_the_first_difference_and_all_who_differ_there_are_found(in_processes):
    def work(number):
        return job.first_difference([5, number // 2, number], "this")

    assert in_processes(4, work) == [(1, "2, 3")] * 4
    assert in_processes(2, lambda number: job.first_difference([1, 2], "this")) == [None] * 2


def test_what_fails_in_one_process_fails_in_all(processes):
    def work(number):
        return job.in_all(lambda: 1 // (number - 1), "dividing")

    first, second, third = processes(3, work)
    assert isinstance(second.error, ZeroDivisionError)
    for ended in (first, third):
        assert isinstance(ended.error, RankFlowError)
        assert "dividing failed in process 1, and so in all: ZeroDivisionError" in str(ended.error)


@pytest.mark.parametrize(
    "collective",
    [
        lambda: job.wait_for_all("waiting"),
        lambda: job.gather(1, "waiting"),
        lambda: job.from_first(1, "waiting"),
        lambda: job.average([torch.ones(1)], "waiting"),
    ],
    ids=["wait_for_all", "gather", "from_first", "average"],
)
def test_whoever_does_not_come_is_not_waited_for_longer_than_the_jobs_timeout(
    collective, processes
):
    def work(number):
        if number == 0:
            time.sleep(3)
            return
        collective()

    ended = processes(2, work, patience=1)[1]
    assert isinstance(ended.error, RankFlowError), ended.told
    assert "waiting waited for the other processes of the job in vain" in str(ended.error)
    assert ended.seconds < 2.5


def test_hosts_wait_as_long_for_each_other_as_devices(in_processes):
    """torch tells the timeout of a group nowhere in public, and other groups take its default."""

    def work(number):
        assert dist.group.WORLD is not None
        return job._patience(dist.group.WORLD).total_seconds()

    assert in_processes(2, work, patience=33) == [33, 33]
