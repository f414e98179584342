"""Where cells run: in this process, in processes of this machine, or on a Ray cluster.

All executors hand the same orders to the same `CellRunner` and bring back the same results; they
differ in who waits for whom. A worker that dies takes one cell with it.
"""

import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol

import torch

from rankflow.ablation.records import CellResult
from rankflow.ablation.worker import CellRunner, Order
from rankflow.errors import RankFlowError
from rankflow.specs.ablation import AblationSpec


class Executor(Protocol):
    """Runs orders; as many at a time as it has workers."""

    @property
    def free(self) -> int:
        """Number of orders that would start at once."""

    def start(self, order: Order) -> None:
        """Begin an order; one worker must be free."""

    def collect(self) -> Iterable[tuple[Order, CellResult | BaseException]]:
        """Wait until at least one order has ended, and return those that have."""

    def close(self) -> None:
        """Stop the workers."""


class HereExecutor:
    """Runs one order after the other in this process.

    Args:
        runner: Runs the cells.
    """

    def __init__(self, runner: CellRunner) -> None:
        self._runner = runner
        self._orders: list[Order] = []

    @property
    def free(self) -> int:
        """One, unless an order waits."""
        return 1 - len(self._orders)

    def start(self, order: Order) -> None:
        """Note the order; it runs when it is collected."""
        self._orders.append(order)

    def collect(self) -> list[tuple[Order, CellResult | BaseException]]:
        """Run the order."""
        orders, self._orders = self._orders, []
        return [(order, self._runner.run(order)) for order in orders]

    def close(self) -> None:
        """Nothing to stop."""


class ProcessExecutor:
    """Runs orders in processes of this machine, each on its own GPU where there are any.

    Args:
        spec: The ablation.
        workers: Number of processes.
        threads: Threads of each.
    """

    def __init__(self, spec: AblationSpec, workers: int, threads: int) -> None:
        self._make = lambda slot: _start_process(spec, threads, slot)
        self._slots = [self._make(slot) for slot in range(workers)]
        self._running: dict[Future[CellResult], tuple[int, Order]] = {}

    @property
    def free(self) -> int:
        """Number of idle processes."""
        return len(self._slots) - len(self._running)

    def start(self, order: Order) -> None:
        """Hand the order to an idle process; one that died since its last order is replaced."""
        busy = {slot for slot, _ in self._running.values()}
        slot = next(slot for slot in range(len(self._slots)) if slot not in busy)
        try:
            future = self._slots[slot].submit(_run, order)
        except BrokenProcessPool:
            self._slots[slot] = self._make(slot)
            future = self._slots[slot].submit(_run, order)
        self._running[future] = (slot, order)

    def collect(self) -> list[tuple[Order, CellResult | BaseException]]:
        """Wait for a process; one that died is replaced."""
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        ended: list[tuple[Order, CellResult | BaseException]] = []
        for future in done:
            slot, order = self._running.pop(future)
            error = future.exception()
            if isinstance(error, BrokenProcessPool):
                self._slots[slot] = self._make(slot)
                error = RankFlowError("the process that ran it died; perhaps memory ran out")
            ended.append((order, error if error is not None else future.result()))
        return ended

    def close(self) -> None:
        """Let idle processes end, and stop those in the middle of a cell."""
        busy = {slot for slot, _ in self._running.values()}
        for slot, pool in enumerate(self._slots):
            if slot in busy:
                for process in list((pool._processes or {}).values()):
                    process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


class RayExecutor:
    """Runs orders on a Ray cluster: the one that ``RAY_ADDRESS`` names, or one on this machine.

    Args:
        spec: The ablation.
        workers: Number of actors; each takes ``threads`` CPUs, and a GPU if the cluster has any.
        threads: Threads of each.

    Raises:
        RankFlowError: Ray is not installed.
    """

    def __init__(self, spec: AblationSpec, workers: int, threads: int) -> None:
        try:
            import ray
        except ImportError as error:
            raise RankFlowError(
                "the executor 'ray' needs Ray; install it by `pip install 'rankflow[ray]'`"
            ) from error
        self._ray = ray
        if not ray.is_initialized():
            local = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers * threads}
            ray.init(include_dashboard=False, log_to_driver=False, **local)
        gpus = 1 if ray.cluster_resources().get("GPU", 0) >= workers else 0
        actor = ray.remote(num_cpus=threads, num_gpus=gpus)(CellRunner)
        self._make = lambda: actor.remote(spec, threads)
        self._actors = [self._make() for _ in range(workers)]
        self._running: dict[Any, tuple[int, Order]] = {}

    @property
    def free(self) -> int:
        """Number of idle actors."""
        return len(self._actors) - len(self._running)

    def start(self, order: Order) -> None:
        """Hand the order to an idle actor."""
        busy = {slot for slot, _ in self._running.values()}
        slot = next(slot for slot in range(len(self._actors)) if slot not in busy)
        self._running[self._actors[slot].run.remote(order)] = (slot, order)

    def collect(self) -> list[tuple[Order, CellResult | BaseException]]:
        """Wait for an actor; one that died is replaced."""
        done, _ = self._ray.wait(list(self._running))
        ended: list[tuple[Order, CellResult | BaseException]] = []
        for reference in done:
            slot, order = self._running.pop(reference)
            try:
                ended.append((order, self._ray.get(reference)))
            except self._ray.exceptions.RayError as error:
                self._actors[slot] = self._make()
                ended.append((order, RankFlowError(f"its Ray actor died: {error}")))
        return ended

    def close(self) -> None:
        """Stop the actors and leave the cluster."""
        self._ray.shutdown()


_RUNNERS: list[CellRunner] = []  # one, in a worker process, which its initializer puts there


def _start_process(spec: AblationSpec, threads: int, slot: int) -> ProcessPoolExecutor:
    context = multiprocessing.get_context("spawn")  # CUDA and threads do not survive a fork
    gpu = slot % torch.cuda.device_count() if torch.cuda.is_available() else None
    return ProcessPoolExecutor(1, context, _set_up, (spec, threads, gpu))


def _set_up(spec: AblationSpec, threads: int, gpu: int | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the parent stops its workers
    threading.Thread(target=_die_with_the_parent, daemon=True).start()
    gc.freeze()  # what the imports made stays: collecting after each cell need not look at it
    if gpu is not None:
        torch.cuda.set_device(gpu)
    _RUNNERS.append(CellRunner(spec, threads))


def _die_with_the_parent() -> None:
    """End this process when the one that started it was killed, and could not stop it."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _run(order: Order) -> CellResult:
    return _RUNNERS[0].run(order)
