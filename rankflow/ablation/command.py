"""What ``rankflow ablate`` does: run what is missing, or only plan, and report."""

from dataclasses import dataclass
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
from rankflow.ablation.report.rows import MethodRow, gather, method_row
from rankflow.ablation.report.terminal import render_terminal
from rankflow.ablation.report.write import write_report
from rankflow.ablation.run import Ablation, run_ablation
from rankflow.ablation.sizing import choose_size
from rankflow.ablation.worker import CellRunner
from rankflow.errors import RankFlowError
from rankflow.specs.ablation import AblationSpec

ExecutorName = Literal["processes", "here", "ray"]


@dataclass(frozen=True, slots=True)
class PlacePlan:
    """What would run at one place.

    Attributes:
        place: Where.
        size_name: What the method's size is called; empty if it has none.
        size: The size that the budget covers; None if there is none to choose.
        parameters: Parameters that it trains; None if it cannot run.
        share: The same as a share of the budget.
        reaches: Whether that is all but a few percent of the budget.
        obstacle: Why it cannot run; None if it can.
    """

    place: Place
    size_name: str = ""
    size: int | None = None
    parameters: int | None = None
    share: float | None = None
    reaches: bool = True
    obstacle: str | None = None


@dataclass(frozen=True, slots=True)
class AblationPlan:
    """What an ablation would run: the places, about how many cells, and how many of them ended."""

    places: tuple[PlacePlan, ...]
    cells: int
    ended: int


@dataclass(frozen=True, slots=True)
class AblationOutcome:
    """What an ablation found.

    Attributes:
        html: The report.
        markdown: The same as Markdown.
        methods: What was measured, place by place.
        incomplete: Why a place is not complete, by its path.
    """

    html: Path
    markdown: Path
    methods: tuple[MethodRow, ...]
    incomplete: dict[str, str]


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
) -> AblationOutcome:
    """Run the cells that are missing, and report.

    Args:
        ablation: The ablation, loaded.
        console: Where to draw.
        report: Folder of the report.
        executor: Where cells run.
        workers: Cells at a time.
        threads: CPU threads of a cell.

    Raises:
        RankFlowError: Another ablation is writing to the same folder.
    """
    with ablation.store.claim():
        if ablation.ready():
            workplace = make_executor(executor, ablation.spec, workers, threads)
            run_ablation(ablation, workplace, console)
        outcome = tell(ablation, console, report=report)
    for path, reason in outcome.incomplete.items():
        console.print(f"{path} is not complete: {reason}", markup=False, soft_wrap=True)
    return outcome


def tell(ablation: Ablation, console: Console, *, report: Path) -> AblationOutcome:
    """Write the results into one file and the report beside it, and print the verdict."""
    results = ablation.reported()
    ablation.store.archive(ablation.store.load().values())
    written = write_report(ablation.spec, results, report, describe_methods(ablation.spec))
    console.print(render_terminal(ablation.spec, results))
    console.print(f"\nreport      {written.html}", highlight=False, soft_wrap=True)
    gathered = gather(ablation.spec, results)
    return AblationOutcome(
        html=written.html,
        markdown=written.markdown,
        methods=tuple(method_row(gathered, place) for place in gathered.tests),
        incomplete={place.path: reason for place, reason in ablation.obstacles().items()},
    )


def describe_methods(spec: AblationSpec) -> dict[str, MethodWords]:
    """Return the methods of an ablation in words."""
    words = {}
    for name in spec.methods:
        method = find_method(spec.variant(name))
        words[name] = MethodWords(method.summary, method.source, method.size_name)
    return words


def print_plan(ablation: Ablation, console: Console) -> AblationPlan:
    """Print what would run: sizes, parameters, and numbers of cells. Nothing trains."""
    runner = CellRunner(ablation.spec)
    with console.status("counting parameters"):
        places = tuple(_plan_place(runner, place) for place in ablation.places)
    plan = AblationPlan(places, ablation.expected(), ablation.ended())
    table = Table(box=None, pad_edge=False)
    for heading in ("task", "budget", "method"):
        table.add_column(heading, overflow="fold")
    for heading in ("size", "parameters", "of the budget"):
        table.add_column(heading, justify="right")
    for planned in plan.places:
        place = planned.place
        table.add_row(place.task, place.budget, place.method, *_cells_of(planned))
    console.print(table)
    console.print(
        f"\nabout {plan.cells:,} cells, {plan.ended:,} of which have run", highlight=False
    )
    return plan


def print_methods(console: Console) -> dict[str, str]:
    """List the methods that a spec can name; return what each is, by name."""
    table = Table("method", "what it is", "source", box=None, pad_edge=False)
    for name, method in METHODS.items():
        table.add_row(name, method.summary, method.source)
    console.print(table)
    return {name: method.summary for name, method in METHODS.items()}


def _plan_place(runner: CellRunner, place: Place) -> PlacePlan:
    method = find_method(runner.spec.variant(place.method))
    budget = runner.parameters_of(place.task, place.budget)
    if isinstance(method, Steered):
        parameters = int(method.factor * budget)
        return PlacePlan(place, parameters=parameters, share=method.factor)
    cell = place.cell("test", 0, method.rate)
    try:
        sized = choose_size(
            method, runner.workload(place.task).build_meta, runner.setting_of(cell, None)
        )
    except UnsupportedError as error:
        return PlacePlan(place, obstacle=str(error))
    return PlacePlan(
        place,
        size_name=method.size_name,
        size=sized.size,
        parameters=sized.parameters,
        share=sized.parameters / budget,
        reaches=reaches(sized.parameters, budget),
    )


def _cells_of(plan: PlacePlan) -> tuple[str, str, str]:
    if plan.obstacle is not None:
        return "", "cannot run", escape(plan.obstacle)
    size = "" if plan.size is None else f"{plan.size_name} {plan.size:,}"
    return size, f"{plan.parameters:,}", f"{plan.share:.0%}{'' if plan.reaches else ' *'}"
