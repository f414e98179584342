"""The command ``rankflow init``: from a model's and a data set's names to a run spec."""

from pathlib import Path

from rich.console import Console

from rankflow.errors import SpecError
from rankflow.specs.budget import load_budget
from rankflow.training.init.checkpoint import read_checkpoint
from rankflow.training.init.choose import choose_reading
from rankflow.training.init.rows import read_first_rows
from rankflow.training.init.settings import choose_settings, measure_rows
from rankflow.training.init.text import Draft, describe_model, write_spec
from rankflow.training.init.wishes import Wishes
from rankflow.training.quiet import quiet_libraries


def init(wishes: Wishes, *, console: Console) -> Path:
    """Write a run spec, and tell what to do with it.

    Args:
        wishes: What was asked for.
        console: Where to print.

    Returns:
        The file.

    Raises:
        RankFlowError: The file exists, or the spec that was asked for cannot be written; nothing
            is.
    """
    output = wishes.output
    if output.exists():
        raise SpecError(f"{output} exists and is not overwritten; name another file by --output")
    if output.suffix != ".toml":
        raise SpecError(f"--output {output}: a run spec ends in .toml")
    with quiet_libraries(), console.status("looking at the data and the model"):
        draft = make_draft(wishes)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("x", encoding="utf-8") as file:
        file.write(write_spec(draft))
    reading = draft.reading
    columns = ", ".join(f"{key} = '{column.name}'" for key, column in reading.columns.items())
    console.print(
        f"{output} written\n"
        f"  {reading.task} on {wishes.model}, {describe_model(draft.model)}\n"
        f"  from {wishes.data}: {columns}\n\n"
        f"next\n  rankflow plan {output}\n  rankflow train {output}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    return output


def make_draft(wishes: Wishes) -> Draft:
    """Look at the data and the model, and choose."""
    budget = load_budget(wishes.budget, rank=wishes.rank)
    rows = read_first_rows(wishes.data, wishes.config)
    model = read_checkpoint(wishes.model, wishes.chat_template)
    reading = choose_reading(rows.columns, model.family, wishes.task, wishes.columns)
    if wishes.chat_template is not None and "messages" not in reading.columns:
        raise SpecError(
            f"--chat-template {wishes.chat_template}: only conversations are written by one"
        )
    settings = choose_settings(
        model,
        reading.task,
        measure_rows(reading, model),
        whole=reading.task == "causal-lm" and {"text", "target"} <= reading.columns.keys(),
    )
    return Draft(wishes, model, rows, reading, settings, budget)
