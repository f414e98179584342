"""What ``rankflow ablate`` does: run what is missing, or only plan, and report."""

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rankflow.ablation.executors import Executor, HereExecutor, ProcessExecutor, RayExecutor
from rankflow.ablation.methods.method import UnsupportedError
from rankflow.ablation.methods.registry import METHODS, find_method
from rankflow.ablation.methods.steered import Steered
from rankflow.ablation.records import Place, reaches
from rankflow.ablation.report.method import MethodWords
from rankflow.ablation.report.terminal import render_terminal
from rankflow.ablation.report.write import write_report
from rankflow.ablation.run import Ablation, run_ablation
from rankflow.ablation.sizing import choose_size
from rankflow.ablation.worker import CellRunner
from rankflow.errors import RankFlowError
from rankflow.specs.ablation import AblationSpec

ExecutorName = Literal["processes", "here", "ray"]


def make_executor(name: ExecutorName, spec: AblationSpec, workers: int, threads: int) -> Executor:
    """Return the executor of a name.

    Raises:
        RankFlowError: Several workers are asked for where there can be one, or Ray is not there.
    """
    if name == "ray":
        return RayExecutor(spec, workers, threads)
    if name == "processes":
        return ProcessExecutor(spec, workers, threads)
    if workers > 1:
        raise RankFlowError(
            f"the executor 'here' runs one cell at a time, not {workers}; use --executor processes"
        )
    return HereExecutor(CellRunner(spec, threads))


def ablate(
    ablation: Ablation,
    console: Console,
    *,
    report: Path,
    executor: ExecutorName = "processes",
    workers: int = 1,
    threads: int = 1,
) -> None:
    """Run the cells that are missing, and report.

    Args:
        ablation: The ablation, loaded.
        console: Where to draw.
        report: Folder of the report.
        executor: Where cells run.
        workers: Cells at a time.
        threads: CPU threads of a cell.
    """
    if ablation.ready():
        run_ablation(ablation, make_executor(executor, ablation.spec, workers, threads), console)
    tell(ablation, console, report=report)
    for place, reason in ablation.obstacles().items():
        console.print(f"{place.path} is not complete: {reason}", markup=False, soft_wrap=True)


def tell(ablation: Ablation, console: Console, *, report: Path) -> None:
    """Write the results into one file and the report beside it, and print the verdict."""
    results = ablation.reported()
    ablation.store.archive(ablation.store.load().values())
    written = write_report(ablation.spec, results, report, describe_methods(ablation.spec))
    console.print(render_terminal(ablation.spec, results))
    console.print(f"\nreport      {written.html}", highlight=False, soft_wrap=True)


def describe_methods(spec: AblationSpec) -> dict[str, MethodWords]:
    """Return the methods of an ablation in words."""
    words = {}
    for name in spec.methods:
        method = find_method(spec.variant(name))
        words[name] = MethodWords(method.summary, method.source, method.size_name)
    return words


def print_plan(ablation: Ablation, console: Console) -> None:
    """Print what would run: sizes, parameters, and numbers of cells. Nothing trains."""
    runner = CellRunner(ablation.spec)
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "budget", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "parameters", "of the budget"):
        table.add_column(heading, justify="right")
    with console.status("counting parameters"):
        for place in ablation.places:
            table.add_row(place.task, place.budget, place.method, *_plan_place(runner, place))
    console.print(table)
    console.print(
        f"\nabout {ablation.expected():,} cells, {ablation.ended():,} of which have run",
        highlight=False,
    )


def print_methods(console: Console) -> None:
    """List the methods that a spec can name."""
    table = Table("method", "what it is", "source", box=None, pad_edge=False)
    for name, method in METHODS.items():
        table.add_row(name, method.summary, method.source)
    console.print(table)


def _plan_place(runner: CellRunner, place: Place) -> tuple[str, str, str]:
    method = find_method(runner.spec.variant(place.method))
    budget = runner.parameters_of(place.task, place.budget)
    if isinstance(method, Steered):
        return "", f"{int(method.factor * budget):,}", f"{method.factor:.0%}"
    cell = place.cell("test", 0, method.rate)
    try:
        sized = choose_size(
            method, runner.workload(place.task).build_meta, runner.setting_of(cell, None)
        )
    except UnsupportedError as error:
        return "", "cannot run", escape(str(error))
    mark = "" if reaches(sized.parameters, budget) else " *"
    size = "" if sized.size is None else f"{method.size_name} {sized.size:,}"
    return size, f"{sized.parameters:,}", f"{sized.parameters / budget:.0%}{mark}"
