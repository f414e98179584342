"""What several commands share: arguments, what a shell completes, records as JSON."""

import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated

import typer

from rankflow.errors import RankFlowError

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="A run spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, as in budget.rank=2; repeatable."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and text for people on stderr.")
]


def check_new_file(suffix: str) -> Callable[[Path | None], Path | None]:
    """Return what refuses a file that could not be written in the end, before any work is done."""

    def check(path: Path | None) -> Path | None:
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise RankFlowError(f"{path} is to be a file; its name must end in {suffix}")
        if path is not None and not path.parent.is_dir():
            raise RankFlowError(f"{path}: there is no folder {path.parent}; make it first")
        return path

    return check


def completer(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what a shell asks for the values of an option, as far as one is typed.

    Args:
        values: All of them; called when a shell asks, so that nothing is imported before.
    """

    def complete(incomplete: str) -> list[str]:
        return [value for value in values() if value.startswith(incomplete)]

    return complete


def presets() -> Iterable[str]:
    """Return the names of the budgets that come with RankFlow."""
    from rankflow.specs.budget import list_budgets

    return list_budgets()


def formats() -> Iterable[str]:
    """Return the names of the formats of an export."""
    from rankflow.export.formats import FORMATS

    return FORMATS


def cases() -> Iterable[str]:
    """Return the names of the benchmark's cases."""
    from rankflow.bench.cases import CASES

    return [case.name for case in CASES]


def answer(command: Callable[[], object], as_json: bool) -> None:
    """Run a command; a script gets its record on stdout, and people's text goes to stderr then."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        record = command()
    if as_json:
        print_json(record)


def print_json(record: object) -> None:
    """Print a record on stdout; what is no finite number becomes null."""
    from pydantic_core import to_json

    typer.echo(to_json(record, indent=2, inf_nan_mode="null").decode())
