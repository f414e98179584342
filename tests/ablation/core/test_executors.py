"""Cells come out the same wherever they run, and a worker that dies takes one cell with it."""

import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from rich.console import Console

from rankflow.ablation.executors import HereExecutor, ProcessExecutor, RayExecutor
from rankflow.ablation.records import Cell, Latency
from rankflow.ablation.report.write import write_report
from rankflow.ablation.run import run_ablation
from rankflow.ablation.worker import CellRunner, Order

CELL = Cell("planted", "rank 2", "lora", "test", 0, 0.02)


class Deadly:
    """What it is sent to dies of unpacking it."""

    def __reduce__(self):
        return os._exit, (1,)


def run_all(ablation, executor):
    run_ablation(ablation, executor, Console(file=io.StringIO()))
    return ablation.reported()


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.distributed
def test_processes_give_what_this_process_gives_and_leave_nothing(planted, ablation_in, measured):
    spec = planted()
    here = run_all(ablation_in(spec, "here"), HereExecutor(CellRunner(spec)))
    executor = ProcessExecutor(spec, 2, 1)
    there = run_all(ablation_in(spec, "processes"), executor)
    assert measured(there) == measured(here)
    assert len(here) == 3 * (2 + 2)
    assert all(result.status == "done" for result in here)
    assert multiprocessing.active_children() == []


@pytest.mark.distributed
@pytest.mark.filterwarnings("ignore::FutureWarning:ray", "ignore::ResourceWarning")
def test_ray_gives_what_this_process_gives_and_survives_an_actor(planted, ablation_in, measured):
    pytest.importorskip("ray")
    spec = planted("seeds=1")
    here = run_all(ablation_in(spec, "here"), HereExecutor(CellRunner(spec)))
    executor = RayExecutor(spec, 2, 1)
    executor.start(Order(CELL, folder=Deadly()))
    ((order, error),) = executor.collect()
    assert order.cell == CELL
    assert "Ray actor died" in str(error)
    assert executor.free == 2
    assert measured(run_all(ablation_in(spec, "ray"), executor)) == measured(here)


@pytest.mark.distributed
def test_a_process_that_dies_costs_one_cell(planted):
    executor = ProcessExecutor(planted(), 2, 1)
    try:
        executor.start(Order(CELL, folder=Deadly()))
        executor.start(Order(replace(CELL, seed=1)))
        assert executor.free == 0
        ended = executor.collect()
        while executor.free < 2:
            ended += executor.collect()
        outcomes = {order.cell.seed: outcome for order, outcome in ended}
        assert "the process that ran it died" in str(outcomes[0])
        assert outcomes[1].status == "done"

        pools = executor._slots
        (process,) = pools[1]._processes.values()  # idle now, and killed all the same
        process.kill()
        process.join()
        wait_until(lambda: pools[1]._broken)
        executor.start(Order(replace(CELL, seed=2)))
        executor.start(Order(replace(CELL, seed=3)))
        ended = executor.collect()
        while executor.free < 2:
            ended += executor.collect()
        assert {order.cell.seed: outcome.status for order, outcome in ended} == {
            2: "done",
            3: "done",
        }
    finally:
        executor.close()
    assert multiprocessing.active_children() == []


@pytest.mark.distributed
def test_a_run_that_is_killed_goes_on_to_the_same_report(planted, ablation_in, measured, tmp_path):
    spec = planted()
    out = tmp_path / "killed"
    program = "from rankflow.cli import app; app()"
    command = [sys.executable, "-c", program, "ablate", str(tmp_path / "tiny.toml")]
    with open(tmp_path / "log", "w") as log:
        run = subprocess.Popen([*command, "--out", str(out)], stdout=log, stderr=log)
    try:
        wait_until(lambda: len(list(out.rglob("result.json"))) >= 3)
        with open(f"/proc/{run.pid}/task/{run.pid}/children") as file:
            workers = file.read().split()
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait()
    assert workers
    wait_until(lambda: not any(map(is_running, workers)))  # none is left without its parent

    resumed, whole = ablation_in(spec, "killed"), ablation_in(spec, "whole")
    kept = len(resumed.results)
    assert 3 <= kept < 12
    run_all(resumed, HereExecutor(CellRunner(spec)))
    run_all(whole, HereExecutor(CellRunner(spec)))
    assert measured(resumed.results.values()) == measured(whole.results.values())
    reports = [
        _timeless_report(ablation, tmp_path / name)
        for name, ablation in (
            ("a", ablation_in(spec, "killed")),
            ("b", ablation_in(spec, "whole")),
        )
    ]
    assert reports[0] == reports[1]


def _timeless_report(ablation, folder):
    """The report's bytes, as if every clock had stood still."""
    results = [
        replace(
            result,
            seconds_per_step=1.0,
            cpu_seconds_per_step=1.0,
            latency=None if result.latency is None else Latency(1.0, 1.0, 1.0),
            provenance=replace(result.provenance, finished="2026-01-01T00:00:00+00:00"),
        )
        for result in ablation.reported()
    ]
    return write_report(ablation.spec, results, folder, {}).markdown.read_bytes()
