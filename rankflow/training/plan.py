"""A dry run: what a run spec would train, what it costs, and when its ranks would move.

The model is built on the ``meta`` device, which stores shapes and no numbers, so that a model that
fits no machine at hand can be planned; its memory is that of two steps on fake tensors.
"""

from dataclasses import replace

import torch
from peft import PeftModel
from rich.console import Console
from transformers import TrainingArguments

from rankflow.adapters.base_weight import count_base_parameters
from rankflow.adapters.sites import find_sites
from rankflow.allocation.policies import feasible_range
from rankflow.allocation.pools import with_pools
from rankflow.memory import peak_bytes, tally_bytes
from rankflow.quiet import quiet_libraries
from rankflow.specs.run import RunSpec
from rankflow.training.adapter import add_adapter, check_names
from rankflow.training.arguments import make_arguments
from rankflow.training.data import load_data
from rankflow.training.fake import NeedsNumbersError, fake_tensors
from rankflow.training.job import Job
from rankflow.training.models import build_meta_model, check_length, load_base_model
from rankflow.training.planned import MemoryPlan, PlannedEvent, RunPlan, print_plan
from rankflow.training.run_budget import resolve_run_budget
from rankflow.training.tokens import make_collator, tokenize
from rankflow.training.trial import StepMemory, longest_row, run_trial


def plan_run(spec: RunSpec, *, console: Console, measure: bool = False) -> RunPlan:
    """Work out a run without training it, and print the outcome.

    Args:
        spec: The run.
        console: Where to draw.
        measure: Also train for two steps on the real model, to measure their memory.

    Raises:
        RankFlowError: Anything about the run is wrong, as in training.
    """
    with quiet_libraries(), console.status("planning"):
        plan = make_plan(spec, measure=measure)
    print_plan(plan, console)
    return plan


def make_plan(spec: RunSpec, *, measure: bool = False) -> RunPlan:
    """Work out a run without training it; see ``plan_run``."""
    data = load_data(spec.data, spec.model.task)
    base = build_meta_model(spec.model, data.labels)
    check_length(spec.data.max_length, base.model.config)
    splits = tokenize(
        data.splits, base.tokenizer, spec.model.task, spec.data.max_length, spec.data.loss_on
    )
    model = add_adapter(base, spec.model, spec.adapter)
    check_names(model, spec.adapter)
    args = make_arguments(spec)
    budget = resolve_run_budget(spec.budget, model, splits["train"], args)
    collate = make_collator(base.tokenizer, spec.model.task)
    scheduler = budget.scheduler
    events = [] if budget.is_static else scheduler.event_steps()
    return RunPlan(
        sites=budget.sites,
        base=count_base_parameters(model),
        head=_trainable(model) - sum(s.parameters for s in find_sites(model, "default")),
        steps=scheduler.total_steps,
        target=budget.target,
        start=budget.start,
        feasible=feasible_range(with_pools(budget.sites)),
        events=tuple(PlannedEvent(step, scheduler.budget_at(step)) for step in events),
        memory=_plan_memory(
            spec,
            Job(data, splits, model, base.tokenizer, collate, {}),
            args,
            measure=measure,
        ),
    )


def _trainable(model: PeftModel) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _plan_memory(spec: RunSpec, job: Job, args: TrainingArguments, *, measure: bool) -> MemoryPlan:
    """Try the run on fake tensors, which spends the job's meta model, and on the real model."""
    measured = _measure(spec, job, args.device) if measure else None
    estimate, unknown = None, None
    try:
        with fake_tensors(job.model, args.device):
            estimate = run_trial(spec, job, tally_bytes)
    except NeedsNumbersError as error:
        unknown = str(error)
    return MemoryPlan(
        device=str(args.device),
        rows=args.train_batch_size,
        tokens=len(longest_row(job.splits["train"])["input_ids"]),
        estimate=estimate,
        unknown=unknown,
        measured=measured,
    )


def _measure(spec: RunSpec, job: Job, device: torch.device) -> StepMemory:
    base = load_base_model(spec.model, job.data.labels)
    real = replace(job, model=add_adapter(base, spec.model, spec.adapter))
    return run_trial(spec, real, lambda train, held: peak_bytes(train, device, held))
