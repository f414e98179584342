"""The command line: each command parses, calls one function, and prints.

Only light modules are imported up here, so that ``rankflow --help`` answers at once.
"""

import errno
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from rankflow.errors import RankFlowError, SpecError, brief
from rankflow.records import RankEvent

if TYPE_CHECKING:
    from rankflow.export.inspect import AdapterSummary

LAST_EVENTS: Final = 10
# How safetensors, tokenizers and torch say that a disk is full: by no OSError.
_FAILED_WRITES: Final = ("os error 28", "iostream error", "PytorchStreamWriter failed writing")
_OS_REMEDIES: Final = {
    errno.EACCES: "choose a place that you may write to, or change its permissions",
    errno.EPERM: "choose a place that you may write to, or change its permissions",
    errno.EROFS: "choose a place that you may write to",
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "a file lies where a folder is meant; name another path",
    errno.EEXIST: "a file lies where a folder is meant; name another path",
    errno.EISDIR: "a folder lies where a file is meant; name another path",
}


class CleanErrors(TyperGroup):
    """Commands whose errors end as a message and exit code 2, without a traceback.

    These are the errors that RankFlow raises on purpose, and those of files and connections; any
    other one is a defect, and keeps its traceback.
    """

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            text = tell_error(error)
            if ctx.params["debug"] or text is None:
                raise
            console = Console(stderr=True)
            message = Text.assemble(("error: ", "bold red"), (text, "red"))
            console.print(message, soft_wrap=not console.is_terminal)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=CleanErrors,
    name="rankflow",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
budgets = typer.Typer(no_args_is_help=True, help="The budgets that come with RankFlow.")
app.add_typer(budgets, name="budgets")

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="A run spec.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override, as in budget.rank=2; repeatable."),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print JSON on stdout, and text for people on stderr.")
]


def _check_new_file(suffix: str) -> Callable[[Path | None], Path | None]:
    """Return what refuses a file that could not be written in the end, before any work is done."""

    def check(path: Path | None) -> Path | None:
        if path is not None and (path.suffix != suffix or path.is_dir()):
            raise RankFlowError(f"{path} is to be a file; its name must end in {suffix}")
        if path is not None and not path.parent.is_dir():
            raise RankFlowError(f"{path}: there is no folder {path.parent}; make it first")
        return path

    return check


def _completer(values: Callable[[], Iterable[str]]) -> Callable[[str], list[str]]:
    """Return what a shell asks for the values of an option, as far as one is typed.

    Args:
        values: All of them; called when a shell asks, so that nothing is imported before.
    """

    def complete(incomplete: str) -> list[str]:
        return [value for value in values() if value.startswith(incomplete)]

    return complete


def _presets() -> Iterable[str]:
    from rankflow.specs.budget import list_budgets

    return list_budgets()


def _formats() -> Iterable[str]:
    from rankflow.export.formats import FORMATS

    return FORMATS


def _cases() -> Iterable[str]:
    from rankflow.bench.cases import CASES

    return [case.name for case in CASES]


def tell_error(error: Exception) -> str | None:
    """Say what went wrong and what to do; None for a defect.

    >>> tell_error(OSError(errno.ENOSPC, "No space left on device", "runs/a"))
    'runs/a: No space left on device; free some space, or write elsewhere'
    """
    if isinstance(error, RankFlowError):
        return str(error)
    if any(sign in str(error) for sign in _FAILED_WRITES) and not isinstance(error, OSError):
        return f"a file could not be written ({brief(error)}); {_OS_REMEDIES[errno.ENOSPC]}"
    if not isinstance(error, OSError) or error.errno == errno.EPIPE:
        return None
    if error.errno is None:  # of a connection, or of a library
        return str(error)
    place = "" if error.filename is None else f"{error.filename}: "
    return f"{place}{error.strerror}; {_OS_REMEDIES.get(error.errno, 'name another path')}"


@app.callback()
def main(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Train LoRA and DoRA adapters whose ranks follow a parameter budget."""


@app.command()
def init(
    model: Annotated[str, typer.Option(help="'minilm', a folder, or a hub id.")],
    data: Annotated[str, typer.Option(help="'docstrings', a file, or a hub id.")],
    task: Annotated[
        Literal["sequence-classification", "token-classification", "causal-lm", "seq2seq-lm"]
        | None,
        typer.Option(help="What to learn, if model and data leave it open."),
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column with the input.")] = None,
    text_pair: Annotated[str | None, typer.Option(help="Column with the second input.")] = None,
    label: Annotated[str | None, typer.Option(help="Column with the class.")] = None,
    messages: Annotated[str | None, typer.Option(help="Column with conversations.")] = None,
    target: Annotated[str | None, typer.Option(help="Column with the output or answer.")] = None,
    config: Annotated[str | None, typer.Option(help="Configuration of a hub data set.")] = None,
    chat_template: Annotated[
        Path | None, typer.Option(help="File with a chat template, if the model has none.")
    ] = None,
    budget: Annotated[
        str,
        typer.Option(help="A preset, or a TOML file.", autocompletion=_completer(_presets)),
    ] = "hybrid",
    rank: Annotated[float, typer.Option(help="The budget as a rank of plain LoRA.")] = 8,
    output: Annotated[Path, typer.Option(help="The run spec to write.")] = Path("run.toml"),
) -> None:
    """Write a commented run spec for a model and a data set."""
    from rankflow.training.init.command import init as write
    from rankflow.training.init.wishes import Wishes

    columns = {
        "text": text,
        "text_pair": text_pair,
        "label": label,
        "messages": messages,
        "target": target,
    }
    wishes = Wishes(
        model=model,
        data=data,
        config=config,
        task=task,
        columns={key: column for key, column in columns.items() if column is not None},
        chat_template=chat_template,
        budget=budget,
        rank=rank,
        output=output,
    )
    write(wishes, console=Console())


@app.command()
def train(run: RunFile, overrides: Overrides = None, as_json: Json = False) -> None:
    """Train an adapter as a run spec says, and export it."""
    from rankflow.specs.run import load_run

    spec = load_run(run, overrides or ())  # its faults show before the slow import below
    from rankflow.training.run import train as train_run

    _answer(lambda: train_run(spec, console=Console()), as_json)


@app.command()
def plan(
    run: RunFile,
    overrides: Overrides = None,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also train for two steps, to measure their memory.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Show sites, costs, budgets, events and memory of a run, without training."""
    from rankflow.specs.run import load_run

    spec = load_run(run, overrides or ())
    from rankflow.training.plan import plan_run

    _answer(lambda: plan_run(spec, console=Console(), measure=measure), as_json)


@app.command()
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
        typer.Option(help="Write the heatmap to this file.", callback=_check_new_file(".png")),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the ranks of a run or of an adapter, or how those of two differ."""
    if diff is not None and path is None:
        from rankflow.export.compare import compare_folders

        compare_folders(*diff, png=png, console=Console())
        return
    if path is None or diff is not None:
        raise RankFlowError("name one folder, or two of them behind --diff")
    from rankflow.export.inspect import CONFIG
    from rankflow.report.events import EVENTS_FILE

    def show() -> object:
        console = Console()
        found: AdapterSummary | dict[str, list[RankEvent]]
        if (path / CONFIG).is_file():
            found = _show_adapter(console, path)
            ranks, magnitudes = found.ranks, None
        elif (path / EVENTS_FILE).is_file():
            found = {"events": _show_run(console, path)}
            ranks, magnitudes = found["events"][-1].ranks, found["events"][-1].magnitudes
        else:
            raise RankFlowError(
                f"{path} holds neither {CONFIG} nor {EVENTS_FILE}; name the folder of an adapter "
                "or a run"
            )
        if png is not None:
            from rankflow.report.heatmap import rank_heatmap

            rank_heatmap(ranks, title=f"Ranks of {path}", magnitudes=magnitudes).savefig(png)
            console.print(f"\nHeatmap written to {png}", soft_wrap=True)
        return found

    _answer(show, as_json)


@app.command()
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


@app.command()
def export(
    source: Annotated[Path, typer.Argument(metavar="FOLDER", help="A run or a checkpoint.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft, peft-uniform (vLLM and the like), diffusers, merged, or lora-svd.",
            autocompletion=_completer(_formats),
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

    _answer(write, as_json)


@app.command()
def compress(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A folder, or a hub id.")],
    output: Annotated[Path, typer.Option(help="The folder to write.")],
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="BUDGET",
            help="Parameters, a preset, or a TOML file.",
            autocompletion=_completer(_presets),
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
        typer.Option(help="Draw the error curve to this file.", callback=_check_new_file(".png")),
    ] = None,
    ranks: Annotated[
        Path | None,
        typer.Option(
            help="Write the ranks to this TOML file, a budget for a new run.",
            callback=_check_new_file(".toml"),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress any LoRA or DoRA adapter to a budget, or to an error."""
    from rankflow.export.command import find_source, parse_budget, run_compress

    request = parse_budget(budget, rank, params, error)
    source = find_source(adapter)
    _answer(
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


@app.command()
def bench(
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            metavar="NAME",
            help="Only this one; repeatable.",
            autocompletion=_completer(_cases),
        ),
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Only cases of this type.")] = None,
    device: Annotated[str, typer.Option(help="A torch device.")] = "cpu",
    rounds: Annotated[int, typer.Option(min=1, help="Steps that count.")] = 9,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny models: shows that it runs, not what it costs.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure the fast DoRA forward against PEFT's LoRA and DoRA."""
    from rankflow.bench.cases import choose_cases

    chosen = choose_cases(cases or (), dtype=dtype, tiny=quick)
    from rankflow.bench.run import run_bench

    def measure() -> object:
        return {"measurements": run_bench(chosen, console=Console(), device=device, rounds=rounds)}

    _answer(measure, as_json)


@app.command()
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

        print_methods(Console())
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

    _answer(work, as_json)


@app.command()
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


@budgets.command("list")
def list_presets(as_json: Json = False) -> None:
    """List the presets."""
    from rankflow.specs.budget import list_budgets, load_budget

    presets = {name: load_budget(name) for name in list_budgets()}
    if as_json:
        _print_json(presets)
        return
    table = Table("preset", "score", "policy", "what it does", box=None, pad_edge=False)
    for name, spec in presets.items():
        table.add_row(name, spec.score, spec.policy, spec.description)
    Console().print(table)


@budgets.command("show")
def show_preset(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A preset, or a TOML file.",
            autocompletion=_completer(_presets),
        ),
    ],
    as_json: Json = False,
) -> None:
    """Print a budget's file, to read or to start your own from."""
    from rankflow.specs.budget import find_budget, load_budget

    spec = load_budget(name)
    if as_json:
        _print_json(spec)
        return
    typer.echo(find_budget(name).read_text(encoding="utf-8"), nl=False)


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


def _answer(command: Callable[[], object], as_json: bool) -> None:
    """Run a command; a script gets its record on stdout, and people's text goes to stderr then."""
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        record = command()
    if as_json:
        _print_json(record)


def _print_json(record: object) -> None:
    """Print a record on stdout; what is no finite number becomes null."""
    from pydantic_core import to_json

    typer.echo(to_json(record, indent=2, inf_nan_mode="null").decode())


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
