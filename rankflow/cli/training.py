"""Commands that train, or tell what training would do and cost."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from rankflow.cli.options import Json, Overrides, RunFile, answer, cases, completer, presets


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
        typer.Option(help="A preset, or a TOML file.", autocompletion=completer(presets)),
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


def train(
    run: RunFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from the newest checkpoint that is as it was written."
        ),
    ] = False,
    as_json: Json = False,
) -> None:
    """Train an adapter as a run spec says, and export it.

    On SIGTERM and Ctrl-C it saves a checkpoint and exits with code 143 or 130.
    """
    from rankflow.specs.run import load_run

    spec = load_run(run, overrides or ())  # its faults show before the slow import below
    from rankflow.training.run import train as train_run

    answer(lambda: train_run(spec, console=Console(), resume=resume), as_json)


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

    answer(lambda: plan_run(spec, console=Console(), measure=measure), as_json)


def bench(
    cases: Annotated[
        list[str] | None,
        typer.Option(
            "--case",
            metavar="NAME",
            help="Only this one; repeatable.",
            autocompletion=completer(cases),
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

    answer(measure, as_json)
