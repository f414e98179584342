"""Commands that compare: methods with each other, weights before and after."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from rankflow.cli.options import Json, Overrides, answer
from rankflow.errors import SpecError


def ablate(
    spec: Annotated[
        Path | None, typer.Argument(metavar="SPEC.toml", help="An ablation spec.")
    ] = None,
    overrides: Overrides = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder where the spec's relative paths start.")
    ] = None,
    out: Annotated[
        str, typer.Option(help="Folder or URL of the results, which all ablations can share.")
    ] = "ablations",
    report: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the report; by default OUT/<name of the spec>, or, where OUT is a URL, "
            "ablations/<name of the spec>."
        ),
    ] = None,
    executor: Annotated[
        Literal["processes", "here", "ray"], typer.Option(help="Where cells run.")
    ] = "processes",
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of a cell.")] = 1,
    only: Annotated[str, typer.Option(metavar="REGEX", help="Only these task/budget/method.")] = "",
    retry: Annotated[bool, typer.Option("--retry", help="Run failed cells again.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show sizes, parameters and numbers of cells.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing, report what there is.")
    ] = False,
    methods: Annotated[bool, typer.Option("--list", help="List the methods.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods at equal parameters, as an ablation spec says."""
    if methods:
        from rankflow.ablation.command import print_methods

        answer(lambda: print_methods(Console()), as_json)
        return
    if spec is None:
        raise SpecError("no spec was given; name an ablation's TOML file, or use --list")
    from rankflow.specs.ablation import load_ablation

    loaded = load_ablation(spec, overrides or (), data)
    from rankflow.ablation.command import ablate as run
    from rankflow.ablation.command import print_plan, tell
    from rankflow.ablation.run import Ablation
    from rankflow.ablation.store import Store

    ablation = Ablation(loaded, Store(out), only)
    ablation.load(retry=retry)
    folder = report or Path("ablations" if "://" in out else out) / loaded.name

    def work() -> object:
        console = Console()
        if dry_run:
            return print_plan(ablation, console)
        if report_only:
            return tell(ablation, console, report=folder)
        pace = {"workers": workers, "threads": threads}
        return run(ablation, console, report=folder, executor=executor, **pace)

    answer(work, as_json)


def analyze(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN...",
            help="Folders of runs, checkpoints, adapters or fine-tuned models, to be compared.",
        ),
    ],
    base: Annotated[
        str, typer.Option(help="The pretrained model: 'minilm', a folder, or a hub id.")
    ],
    match: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Only weights in whose names this is found.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="A folder for analysis.json and analysis.png.")
    ] = None,
) -> None:
    """Tell how training changed weights: in magnitude, in direction, and the two together."""
    from rankflow.analysis.run import analyze as analyze_runs

    analyze_runs(runs, base=base, match=match, output=output, console=Console())
