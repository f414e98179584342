"""The budget of a run, resolved on a model without numbers: what does not fit shows at once."""

import math

from datasets import Dataset
from peft import PeftModel
from transformers import TrainingArguments

from rankflow.adapters.base_weight import count_base_parameters
from rankflow.adapters.gating import convert
from rankflow.adapters.sites import find_sites
from rankflow.adapters.stock import check_trainable
from rankflow.budgeting import ResolvedBudget, resolve_budget
from rankflow.errors import SpecError
from rankflow.specs.budget import BudgetSpec


def resolve_run_budget(
    spec: BudgetSpec, model: PeftModel, rows: Dataset, args: TrainingArguments
) -> ResolvedBudget:
    """Resolve the budget as the engine does once training begins.

    Args:
        spec: The budget.
        model: The model with its adapter, on ``meta``; its sites are converted to the budget's kind
            of components.
        rows: The training rows, in tokens.
        args: The training arguments.

    Raises:
        SiteError: The adapter has no site, or one that cannot be steered.
        SpecError: The rows make no batch.
        BudgetError: The budget does not fit the sites or the steps.
    """
    steps = count_steps(rows, args)
    sites = find_sites(model, "default")
    check_trainable(model, "default", sites)
    convert(sites, spec.components)
    return resolve_budget(
        spec,
        [site.describe(*spec.bounds_of(site.name), magnitude=spec.magnitude) for site in sites],
        total_steps=steps,
        base_parameters=count_base_parameters(model),
        bytes_per_parameter=sites[0].A.element_size(),
    )


def count_steps(rows: Dataset, args: TrainingArguments) -> int:
    """Count the optimizer steps that a Trainer takes on the rows, in one process.

    Raises:
        SpecError: The rows make no batch.
    """
    batches = math.ceil(len(rows) / args.train_batch_size)
    if args.dataloader_drop_last:
        batches = len(rows) // args.train_batch_size
    if batches == 0:
        raise SpecError(
            f"[train] per_device_train_batch_size = {args.per_device_train_batch_size}, "
            f"dataloader_drop_last = true: {len(rows)} training rows make no whole batch of "
            f"{args.train_batch_size}; lower the one, or remove the other"
        )
    if args.max_steps > 0:
        return int(args.max_steps)
    steps = max(1, math.ceil(batches / args.gradient_accumulation_steps))
    return math.ceil(args.num_train_epochs * steps)
