"""The command line: each command parses, calls one function, and prints.

Only light modules are imported at the top of these files, so that ``rankflow --help`` answers at
once.
"""

from typing import Annotated

import typer

from rankflow.cli.adapters import compress, export, inspect, report
from rankflow.cli.errors import CleanErrors
from rankflow.cli.presets import list_presets, show_preset
from rankflow.cli.studies import ablate, analyze
from rankflow.cli.training import bench, init, plan, train

app = typer.Typer(
    cls=CleanErrors,
    name="rankflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for command in (init, train, plan, inspect, report, export, compress, bench, ablate, analyze):
    app.command()(command)
budgets = typer.Typer(no_args_is_help=True, help="The budgets that come with RankFlow.")
budgets.command("list")(list_presets)
budgets.command("show")(show_preset)
app.add_typer(budgets, name="budgets")


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Train LoRA and DoRA adapters whose ranks follow a parameter budget."""
