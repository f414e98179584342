"""What a dry run finds out, and how it is told."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from rankflow.records import SiteInfo
from rankflow.report.layout import parse_site, shortest_endings
from rankflow.training.trial import StepMemory

_SHOWN_EVENTS = 12


@dataclass(frozen=True, slots=True)
class PlannedEvent:
    """A reallocation: after which step, and the budget from then on, in parameters."""

    step: int
    budget: int


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What memory a training step takes.

    Attributes:
        device: Where the run would train.
        rows: Rows of a micro-batch.
        tokens: Tokens of the longest row, which every row of it may have.
        estimate: Bytes at the largest budget; None where they cannot be told without numbers.
        unknown: Why they cannot.
        measured: The same, measured by training for two steps; None if that was not asked for.
    """

    device: str
    rows: int
    tokens: int
    estimate: StepMemory | None
    unknown: str | None
    measured: StepMemory | None


@dataclass(frozen=True, slots=True)
class RunPlan:
    """What a run would do.

    Attributes:
        sites: The adapted modules.
        base: Parameters of the base model.
        head: Trainable parameters beside the adapter.
        steps: Optimizer steps.
        target: Trainable adapter parameters allowed at the end.
        start: Trainable adapter parameters allowed at the first step.
        feasible: Smallest and largest budget that the sites can take, in parameters.
        events: The reallocations.
        memory: What memory a step takes.
    """

    sites: tuple[SiteInfo, ...]
    base: int
    head: int
    steps: int
    target: int
    start: int
    feasible: tuple[int, int]
    events: tuple[PlannedEvent, ...]
    memory: MemoryPlan


def print_plan(plan: RunPlan, console: Console) -> None:
    """Print sites, budgets, events and memory."""
    console.print(_sites_table(plan))
    lowest, highest = plan.feasible
    console.print(
        f"\nbase        {plan.base:,} parameters, frozen\n"
        f"budget      {plan.start:,} parameters at first, {plan.target:,} at the end\n"
        f"feasible    {lowest:,} to {highest:,}\n"
        f"task head   {plan.head:,}, beside the budget\n"
        f"steps       {plan.steps:,}, with {len(plan.events):,} reallocations",
        highlight=False,
    )
    if plan.events:
        console.print(_events_table(plan))
    for line in _memory_lines(plan.memory):
        console.print(line, highlight=False, soft_wrap=True)


def _sites_table(plan: RunPlan) -> Table:
    """Show sites that differ in nothing but their layer on one line."""
    alike: dict[tuple[object, ...], list[SiteInfo]] = {}
    for site in plan.sites:
        position = parse_site(site.name)
        key = (position.stack, position.type, site.in_features, site.out_features, site.max_rank)
        alike.setdefault(key, []).append(site)
    stacks = list(dict.fromkeys(parse_site(site.name).stack for site in plan.sites))
    short = dict(zip(stacks, shortest_endings(stacks), strict=True))
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("sites", overflow="fold")
    for heading in ("count", "in", "out", "per rank", "magnitude", "ranks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for sites in alike.values():
        first = sites[0]
        table.add_row(
            _pattern(first, len(sites), short),
            str(len(sites)),
            f"{first.in_features:,}",
            f"{first.out_features:,}",
            f"{first.component_cost:,}",
            f"{first.out_features if first.has_magnitude else 0:,}",
            f"{first.min_rank}-{first.max_rank}",
        )
    return table


def _pattern(site: SiteInfo, count: int, short: Mapping[tuple[str, ...], str]) -> str:
    position = parse_site(site.name)
    if count == 1 or position.layer is None:
        return site.name
    return ".".join([short[position.stack], "*", *position.type])


def _events_table(plan: RunPlan) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("\nreallocation", justify="right")
    table.add_column("after step", justify="right")
    table.add_column("budget", justify="right")
    rows = [(str(n), f"{e.step:,}", f"{e.budget:,}") for n, e in enumerate(plan.events)]
    if len(rows) > _SHOWN_EVENTS:
        rows = [*rows[: _SHOWN_EVENTS - 2], ("...", "", ""), rows[-1]]
    for row in rows:
        table.add_row(*row)
    return table


def _memory_lines(memory: MemoryPlan) -> Iterator[str]:
    yield ""
    estimate, measured = memory.estimate, memory.measured
    if estimate is None:
        yield f"memory      not estimated: {memory.unknown}"
    else:
        batch = f"{memory.rows} rows of {memory.tokens} tokens on {memory.device}"
        yield f"memory      {decimal(estimate.peak)} at the peak of a step, for {batch}"
        yield f"            {_tell_parts(estimate)}"
    if measured is not None:
        yield f"measured    {decimal(measured.peak)}{_compare(estimate, measured)}"
        yield f"            {_tell_parts(measured)}"


def _tell_parts(memory: StepMemory) -> str:
    return (
        f"weights {decimal(memory.weights)}, adapter and head {decimal(memory.trained)}, "
        f"optimizer {decimal(memory.optimizer)}, activations, gradients and temporaries "
        f"{decimal(memory.working)}"
    )


def _compare(estimate: StepMemory | None, measured: StepMemory) -> str:
    if estimate is None:
        return ""
    share = estimate.peak / measured.peak - 1
    return f", and the estimate is {abs(share):.1%} {'above' if share >= 0 else 'below'}"
