"""Commands for the budgets that come with RankFlow."""

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from rankflow.cli.options import Json, completer, presets, print_json


def list_presets(as_json: Json = False) -> None:
    """List the presets."""
    from rankflow.specs.budget import list_budgets, load_budget

    presets = {name: load_budget(name) for name in list_budgets()}
    if as_json:
        print_json(presets)
        return
    table = Table("preset", "score", "policy", "what it does", box=None, pad_edge=False)
    for name, spec in presets.items():
        table.add_row(name, spec.score, spec.policy, spec.description)
    Console().print(table)


def show_preset(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A preset, or a TOML file.",
            autocompletion=completer(presets),
        ),
    ],
    as_json: Json = False,
) -> None:
    """Print a budget's file, to read or to start your own from."""
    from rankflow.specs.budget import find_budget, load_budget

    spec = load_budget(name)
    if as_json:
        print_json(spec)
        return
    typer.echo(find_budget(name).read_text(encoding="utf-8"), nl=False)
