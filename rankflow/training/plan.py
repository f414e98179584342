"""A dry run: what a run spec would train, what it costs, and when its ranks would move.

The model is built on the ``meta`` device, which stores shapes and no numbers, so that a model that
fits no machine at hand can be planned.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from datasets import Dataset
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments

from rankflow.adapters.base_weight import count_base_parameters
from rankflow.adapters.gating import convert
from rankflow.adapters.sites import find_sites
from rankflow.adapters.stacked import warn_of_stacked_weights
from rankflow.allocation.policies import feasible_range
from rankflow.allocation.pools import with_pools
from rankflow.budgeting import ResolvedBudget, resolve_budget
from rankflow.quiet import quiet_libraries
from rankflow.records import SiteInfo
from rankflow.report.layout import parse_site, shortest_endings
from rankflow.specs.run import RunSpec
from rankflow.training.adapter import add_adapter
from rankflow.training.arguments import make_arguments
from rankflow.training.data import load_data
from rankflow.training.models import build_meta_model, check_length
from rankflow.training.tokens import tokenize

_SHOWN_EVENTS = 12


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes that a run holds on its device, activations apart.

    Attributes:
        weights: The frozen base model.
        adapter: Trainable parameters, task head included, at the largest budget.
        gradients: Their gradients.
        optimizer: Two moments for each of them, as in AdamW.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.adapter + self.gradients + self.optimizer


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
        events: Step and budget of each reallocation.
        memory: Bytes at the largest budget.
    """

    sites: tuple[SiteInfo, ...]
    base: int
    head: int
    steps: int
    target: int
    start: int
    feasible: tuple[int, int]
    events: tuple[tuple[int, int], ...]
    memory: MemoryEstimate


def plan_run(spec: RunSpec, *, console: Console) -> RunPlan:
    """Work out a run without training it, and print the outcome.

    Raises:
        RankFlowError: Anything about the run is wrong, as in training.
    """
    with quiet_libraries(), console.status("planning"):
        plan = make_plan(spec)
    _print_plan(plan, console)
    return plan


def make_plan(spec: RunSpec) -> RunPlan:
    """Work out a run without training it."""
    data = load_data(spec.data, spec.model.task)
    base = build_meta_model(spec.model, data.labels)
    check_length(spec.data.max_length, base.model.config)
    rows = tokenize(
        data.splits, base.tokenizer, spec.model.task, spec.data.max_length, spec.data.loss_on
    )["train"]
    model = add_adapter(base, spec.model, spec.adapter)
    steps = count_steps(rows, make_arguments(spec))
    sites = find_sites(model, "default")
    warn_of_stacked_weights(model)
    convert(sites, spec.budget.components)
    budget = resolve_budget(
        spec.budget,
        [
            site.describe(*spec.budget.bounds_of(site.name), magnitude=spec.budget.magnitude)
            for site in sites
        ],
        total_steps=steps,
        base_parameters=count_base_parameters(model),
        bytes_per_parameter=sites[0].A.element_size(),
    )
    scheduler = budget.scheduler
    events = [] if budget.is_static else scheduler.event_steps()
    head = _trainable(model) - sum(site.parameters for site in sites)
    return RunPlan(
        sites=budget.sites,
        base=count_base_parameters(model),
        head=head,
        steps=steps,
        target=budget.target,
        start=budget.start,
        feasible=feasible_range(with_pools(budget.sites)),
        events=tuple((step, scheduler.budget_at(step)) for step in events),
        memory=_estimate_memory(model, budget, head),
    )


def count_steps(rows: Dataset, args: TrainingArguments) -> int:
    """Count the optimizer steps that a Trainer takes on the rows, in one process."""
    if args.max_steps > 0:
        return int(args.max_steps)
    batches = math.ceil(len(rows) / args.train_batch_size)
    if args.dataloader_drop_last:
        batches = len(rows) // args.train_batch_size
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps)


def _trainable(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _estimate_memory(model: PeftModel, budget: ResolvedBudget, head: int) -> MemoryEstimate:
    weights = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    trained = max(budget.start, budget.target) + head
    width = max(p.element_size() for p in model.parameters() if p.requires_grad)
    return MemoryEstimate(weights, trained * width, trained * width, 2 * trained * width)


def _print_plan(plan: RunPlan, console: Console) -> None:
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
    memory = plan.memory
    console.print(
        f"\nmemory      {_megabytes(memory.total)} beside activations: "
        f"weights {_megabytes(memory.weights)}, adapter and head {_megabytes(memory.adapter)}, "
        f"gradients {_megabytes(memory.gradients)}, AdamW {_megabytes(memory.optimizer)}",
        highlight=False,
        soft_wrap=True,
    )


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
    rows = [(str(n), f"{step:,}", f"{limit:,}") for n, (step, limit) in enumerate(plan.events)]
    if len(rows) > _SHOWN_EVENTS:
        rows = [*rows[: _SHOWN_EVENTS - 2], ("...", "", ""), rows[-1]]
    for row in rows:
        table.add_row(*row)
    return table


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
