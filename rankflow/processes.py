"""What the processes of one job tell each other; in a job of one process there is nothing to tell.

Tensors are averaged where they are, by the job's own backend. Everything else, which is small and
needed on the host, goes over gloo, so that no process waits for its device and a process that does
not come is named.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rankflow.errors import RankFlowError, brief

T = TypeVar("T")


def are_several() -> bool:
    """Whether the job has more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def count() -> int:
    """Processes of the job."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process is the one that decides, writes and speaks."""
    return not are_several() or dist.get_rank() == 0


def add_up(tensor: Tensor, what: str) -> None:
    """Replace a tensor by its sum over all processes, in place.

    Args:
        tensor: A tensor of floats, of equal shape in all processes.
        what: What is being done, as the subject of a sentence.

    Raises:
        RankFlowError: A process did not take part.
    """
    if are_several():
        with _together(what):
            dist.all_reduce(tensor)


def average(tensors: Sequence[Tensor], what: str) -> None:
    """Replace tensors by their mean over all processes, in place.

    Args:
        tensors: Tensors of floats, of equal shapes in all processes.
        what: What is being done, as the subject of a sentence.

    Raises:
        RankFlowError: A process did not take part.
    """
    if not are_several():
        return
    with _together(what):
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(dist.get_world_size())


def from_first(value: T, what: str) -> T:
    """Return the first process's value in all of them.

    Args:
        value: A plain value, or a record of numpy arrays; only the first process's counts.
        what: What is being done, as the subject of a sentence.

    Raises:
        RankFlowError: A process did not take part.
    """
    if not are_several():
        return value
    values: list[Any] = [value]
    with _together(what):
        dist.broadcast_object_list(values, src=0, group=_hosts())
    return values[0]


def tensors_from_first(tensors: Sequence[Tensor], what: str) -> None:
    """Overwrite tensors with those of the first process.

    Args:
        tensors: Tensors of equal shapes in all processes; one after the other is sent.
        what: What is being done, as the subject of a sentence.

    Raises:
        RankFlowError: A process did not take part.
    """
    if not are_several():
        return
    with _together(what):
        for tensor in tensors:
            sent = tensor.contiguous()
            dist.broadcast(sent, src=0)
            if sent is not tensor:
                tensor.copy_(sent)


def gather(value: T, what: str) -> list[T]:
    """Return the values of all processes, in their order, in each of them.

    Args:
        value: A plain value.
        what: What is being done, as the subject of a sentence.

    Raises:
        RankFlowError: A process did not take part.
    """
    if not are_several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    with _together(what):
        dist.all_gather_object(values, value, group=_hosts())
    return values


def in_all(work: Callable[[], T], what: str) -> T:
    """Do something in every process, and raise in every process if it fails in one.

    Args:
        work: What to do; it must not wait for other processes.
        what: What is being done, as the subject of a sentence.

    Raises:
        RankFlowError: It failed in another process. What it raises here passes.
    """
    if not are_several():
        return work()
    error: Exception | None = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    told = gather(None if error is None else f"{type(error).__name__}: {brief(error)}", what)
    if error is not None:
        raise error
    for number, message in enumerate(told):
        if message is not None:
            raise RankFlowError(f"{what} failed in process {number}, and so in all: {message}")
    return result


def first_difference(values: Sequence[int], what: str) -> tuple[int, str] | None:
    """Tell where the processes do not have the same values.

    Args:
        values: This process's, as many as the others have.
        what: What is being done, as the subject of a sentence.

    Returns:
        The first index at which they differ, and the processes that differ from the first one; None
        if they are equal.

    Raises:
        RankFlowError: A process did not take part.
    """
    for index, column in enumerate(zip(*gather(list(values), what), strict=True)):
        others = [str(number) for number, value in enumerate(column) if value != column[0]]
        if others:
            return index, ", ".join(others)
    return None


def check_equal(values: Sequence[int], names: Sequence[str], what: str) -> None:
    """Check that all processes left the same adapters.

    Args:
        values: A number for each site.
        names: The sites.
        what: What was done, as the subject of a sentence.

    Raises:
        RankFlowError: A number differs; the message has the site's name, and the processes.
    """
    difference = first_difference(values, what)
    if difference is not None:
        index, others = difference
        raise RankFlowError(
            f"{what} left different adapters: at site {names[index]!r} the ranks, parameters or "
            f"optimizer state of process {others} are not those of process 0; give all processes "
            "the same seed, model, budget, optimizer and versions, and resume from the last "
            "checkpoint"
        )


def wait_for_all(what: str) -> None:
    """Wait until all processes have come here.

    Raises:
        RankFlowError: One did not; the message has its number.
    """
    if are_several():
        with _together(what):
            dist.monitored_barrier(_hosts(), _patience(_job()), wait_all_ranks=True)


def _job() -> dist.ProcessGroup:
    assert dist.group.WORLD is not None  # there are several processes
    return dist.group.WORLD


def _hosts() -> dist.ProcessGroup:
    """Return a group of all processes that talks between hosts, not devices."""
    return _host_group(_job())


@lru_cache(maxsize=1)
def _host_group(job: dist.ProcessGroup) -> dist.ProcessGroup:
    if dist.get_backend(job) == "gloo":
        return job
    return dist.new_group(backend="gloo", timeout=_patience(job))


def _patience(job: dist.ProcessGroup) -> timedelta:
    """Return how long processes of the job wait for each other; torch's own default is longer."""
    timeout: timedelta = job._get_backend(job._device_types[0]).options._timeout
    return timeout


@contextmanager
def _together(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, torch.distributed.DistError) as error:
        raise RankFlowError(
            f"{what} waited for the other processes of the job in vain ({brief(error)}); one of "
            "them ended, hangs, or is in another step: look at what it printed, and resume from "
            "the last checkpoint"
        ) from error
