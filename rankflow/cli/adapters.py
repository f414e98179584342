"""Commands for what training has left: look at it, export it, compress it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankflow.cli.options import Json, answer, check_new_file, completer, formats, presets
from rankflow.errors import RankFlowError, SpecError
from rankflow.records import RankEvent

if TYPE_CHECKING:
    from rankflow.export.inspect import AdapterSummary

LAST_EVENTS: Final = 10


def inspect(
    path: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="A run or an adapter.")
    ] = None,
    diff: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="A B", help="Two runs or adapters, whose ranks are compared."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Write the heatmap to this file.", callback=check_new_file(".png")),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the ranks of a run or of an adapter, or how those of two differ."""
    from rankflow.export.compare import compare_folders, holds_adapter

    if diff is not None and path is None:
        answer(lambda: compare_folders(*diff, png=png, console=Console()), as_json)
        return
    if path is None or diff is not None:
        raise RankFlowError("name one folder, or two of them behind --diff")

    def show() -> object:
        console = Console()
        found: AdapterSummary | dict[str, list[RankEvent]]
        if holds_adapter(path):
            found = _show_adapter(console, path)
            ranks, magnitudes = found.ranks, None
        else:
            found = {"events": _show_run(console, path)}
            ranks, magnitudes = found["events"][-1].ranks, found["events"][-1].magnitudes
        if png is not None:
            from rankflow.report.heatmap import rank_heatmap

            rank_heatmap(ranks, title=f"Ranks of {path}", magnitudes=magnitudes).savefig(png)
            console.print(f"\nHeatmap written to {png}", soft_wrap=True)
        return found

    answer(show, as_json)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
    output: Annotated[
        Path | None, typer.Option(help="The file to write; by default report.html in the run.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Another run, to be compared with.")
    ] = None,
) -> None:
    """Write how the ranks of a run moved as one HTML file, to look at in a browser."""
    from rankflow.report.view.page import report_runs

    path = report_runs([run] if compare is None else [run, compare], output or run / "report.html")
    Console().print(f"{path} is written; open it in a browser", soft_wrap=True)


def export(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft, peft-uniform (vLLM and the like), diffusers, merged, or lora-svd.",
            autocompletion=completer(formats),
        ),
    ] = "peft",
    base: Annotated[
        str | None,
        typer.Option(help="The base model, a folder or hub id, if not the one that it names."),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="merged: type of the weights.")] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="merged: largest file, 5GB by default.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(help="peft-uniform: the one rank. lora-svd: a budget to share.")
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="lora-svd: largest relative error of the change, 0.01 by default."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write the adapter of a run or of a checkpoint for other programs, checked by their loader."""
    from rankflow.export.formats import find_format
    from rankflow.export.options import ExportOptions

    options = ExportOptions(
        rank=rank, max_error=max_error, dtype=dtype, max_shard_size=max_shard_size
    )
    chosen = find_format(format)  # refusals show before the slow import below
    options.check(chosen)
    from rankflow.export.folder import export_folder
    from rankflow.export.report import read_report, tell

    def write() -> object:
        folder = export_folder(source, output, format=format, base_model=base, options=options)
        console, written = Console(), read_report(folder)
        console.print(f"{folder} holds {chosen.writes}", soft_wrap=True)
        for line in tell(written):
            console.print(f"  {line}", soft_wrap=True, highlight=False)
        return written

    answer(write, as_json)


def compress(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a hub id.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET",
            help="Parameters, a preset, or a TOML file.",
            autocompletion=completer(presets),
        ),
    ] = None,
    rank: Annotated[
        float | None, typer.Option(help="As many parameters as plain LoRA of this rank has.")
    ] = None,
    params: Annotated[int | None, typer.Option(help="Parameters, magnitudes included.")] = None,
    error: Annotated[
        float | None, typer.Option(help="The smallest adapter of at most this relative error.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="The base model of a DoRA adapter: 'minilm', a folder, or a hub id; by default "
            "the one that the adapter names."
        ),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN.toml",
            help="Choose by the loss measured on some training rows of this run spec, with its "
            "base model; by default by the energy of the components.",
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(help="Draw the error curve to this file.", callback=check_new_file(".png")),
    ] = None,
    ranks: Annotated[
        Path | None,
        typer.Option(
            help="Write the ranks to this TOML file, a budget for a new run.",
            callback=check_new_file(".toml"),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress any LoRA or DoRA adapter to a budget, or to an error."""
    from rankflow.export.command import find_source, parse_budget, run_compress

    request = parse_budget(budget, rank, params, error)
    source = find_source(adapter)
    answer(
        lambda: run_compress(
            source,
            output,
            request,
            error=error,
            base=_read_base(source, base, run),
            png=png,
            ranks=ranks,
            console=Console(),
        ),
        as_json,
    )


def _read_base(adapter: Path, base: str | None, run: Path | None) -> Any:
    if run is None:
        from rankflow.analysis.base_rows import read_by_name

        return read_by_name(adapter, base)
    if base is not None:
        raise SpecError("--run names the base model already; leave --base out")
    from rankflow.specs.run import load_run

    spec = load_run(run, ())  # its faults show before the slow import below
    from rankflow.training.calibration import read_by_run

    return read_by_run(spec, adapter)


def _show_adapter(console: Console, folder: Path) -> "AdapterSummary":
    from rankflow.export.card import tell_storage
    from rankflow.export.inspect import inspect_adapter
    from rankflow.report.terminal import rank_table

    summary = inspect_adapter(folder)
    table = _new_table("site", "rank", "scale", "DoRA", "parameters")
    for site in summary.sites:
        table.add_row(
            site.name,
            str(site.rank),
            f"{site.scale:.3g}",
            "yes" if site.has_magnitude else "no",
            f"{site.parameters:,}",
        )
    console.print(table)
    costs = {site.name: site.parameters for site in summary.sites}
    console.print(Text("\n"), rank_table(summary.ranks, costs=costs, width=console.width), sep="")
    console.print(
        f"\n{len(summary.sites)} sites, {summary.parameters:,} parameters, "
        f"and {summary.other_parameters:,} beside them",
        highlight=False,
    )
    trained = summary.trained_parameters
    if trained is not None and trained != summary.parameters:
        console.print(tell_storage(trained, summary.parameters), highlight=False)
    unequal = [site for site in summary.sites if site.rank != site.config_rank]
    if unequal:
        names = ", ".join(f"{s.name} ({s.rank}, not {s.config_rank})" for s in unequal)
        console.print(Text(f"PEFT cannot load it: other ranks than its config at {names}", "red"))
    return summary


def _show_run(console: Console, folder: Path) -> list[RankEvent]:
    from rankflow.report.events import read_run
    from rankflow.report.terminal import rank_table

    events = read_run(folder)
    table = _new_table("event", "step", "budget", "spent", "ranks", "pruned", "born")
    for event in events[-LAST_EVENTS:]:
        table.add_row(
            str(event.index),
            f"{event.step:,}",
            f"{event.limit:,}",
            f"{event.spent:,}",
            f"{min(event.ranks.values())}-{max(event.ranks.values())}",
            f"{len(event.pruned):,}",
            f"{len(event.born):,}",
        )
    console.print(table)
    last = events[-1]
    console.print(
        Text("\n"), rank_table(last.ranks, magnitudes=last.magnitudes, width=console.width), sep=""
    )
    return events


def _new_table(first: str, *others: str) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(first, overflow="fold")
    for heading in others:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
