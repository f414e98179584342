"""Analyse runs: measure, correlate, print, and write what was found."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rankflow.analysis.checkpoints import find_checkpoints, name_runs
from rankflow.analysis.correlation import Correlation, correlate
from rankflow.analysis.figure import change_scatter, shorten
from rankflow.analysis.points import Point, Run, choose_sites, measure_run
from rankflow.analysis.weights import load_weights
from rankflow.report.layout import GridLayout, lay_out
from rankflow.training.locating import locate
from rankflow.training.run_folder import write_json

RESULTS_FILE = "analysis.json"
FIGURE_FILE = "analysis.png"
_DOTS_PER_INCH = 150


@dataclass(frozen=True, slots=True)
class Analysis:
    """What was found in one run.

    Attributes:
        run: Its points.
        pooled: The correlation over all of them.
        kinds: Over the weights of one kind, by the kind's name.
        moments: Over the weights at one checkpoint, by its label.
    """

    run: Run
    pooled: Correlation
    kinds: dict[str, Correlation]
    moments: dict[str, Correlation]


def analyze(
    folders: Sequence[Path],
    *,
    base: str,
    console: Console,
    match: str | None = None,
    output: Path | None = None,
) -> list[Analysis]:
    """Measure how the runs changed the base model's weights, in magnitude and in direction.

    Args:
        folders: Of each run: an adapter, a model, a checkpoint, or several checkpoints.
        base: The pretrained model: 'minilm', a folder, or a hub id.
        console: Where to print.
        match: A regular expression that is searched for in the weights' names; None takes all
            linear layers.
        output: Folder for ``analysis.json`` and ``analysis.png``; None writes neither.

    Returns:
        An analysis of each run.

    Raises:
        RankFlowError: A run has no checkpoint, does not belong to the base, or nothing matches.
    """
    found = [find_checkpoints(folder) for folder in folders]
    with console.status("") as status:
        status.update(f"Reading {base}")
        weights = load_weights(locate(base))
        wanted = choose_sites(weights, match)
        runs = []
        for name, folder, checkpoints in zip(name_runs(folders), folders, found, strict=True):
            status.update(f"Measuring {name}")
            runs.append(measure_run(name, folder, checkpoints, weights, wanted))
        layout = lay_out(site for site in weights.layers if any(site in run.sites for run in runs))
        status.update("Correlating")
        analyses = [_correlate_run(run, layout) for run in runs]
    for analysis in analyses:
        _print(console, analysis)
    _print_notes(console, analyses)
    if output is not None:
        _write(output, base, match, analyses, layout)
        console.print(f"\nWritten to {output}: {RESULTS_FILE}, {FIGURE_FILE}", soft_wrap=True)
    return analyses


def _correlate_run(run: Run, layout: GridLayout) -> Analysis:
    moved = [point for point in run.points if _tells(point)]
    kinds = {
        kind: [point for point in moved if _kind_of(point.site, layout) == kind]
        for kind in dict.fromkeys(_kind_of(site, layout) for site in run.sites)
    }
    moments = {
        checkpoint.label: [point for point in moved if point.moment == index]
        for index, checkpoint in enumerate(run.moments)
    }
    return Analysis(
        run=run,
        pooled=_correlate(moved, layout),
        kinds={name: _correlate(points, layout) for name, points in kinds.items()},
        moments={name: _correlate(points, layout) for name, points in moments.items()},
    )


def _correlate(points: Sequence[Point], layout: GridLayout) -> Correlation:
    return correlate(
        [point.change.dD or 0.0 for point in points],
        [point.change.dM for point in points],
        [layout.cells[point.site].row for point in points],
    )


def _tells(point: Point) -> bool:
    """Whether a point says something of how the two changes go together."""
    return not point.change.is_nothing and point.change.dD is not None


def _kind_of(site: str, layout: GridLayout) -> str:
    cell = layout.cells[site]
    return layout.columns[cell.column] if cell.span == 1 else layout.rows[cell.row]


def _print(console: Console, analysis: Analysis) -> None:
    run, pooled = analysis.run, analysis.pooled
    console.print(
        Text.assemble(
            "\n",
            (run.name, "bold"),
            f": {len(run.sites)} weights in {_count(pooled.layers, 'layer')}, ",
            ", ".join(moment.label for moment in run.moments),
        )
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("", overflow="fold")
    for heading in ("points", "Pearson", "Spearman"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("all", *_cells(pooled))
    for parts in (analysis.kinds, analysis.moments):
        for name, correlation in parts.items() if len(parts) > 1 else ():
            table.add_row(name, *_cells(correlation))
    console.print(table)


def _print_notes(console: Console, analyses: Sequence[Analysis]) -> None:
    notes = [
        "Correlations of dD and dM, with 95% intervals from a bootstrap that draws whole layers: "
        "the points of one layer are not independent."
    ]
    for analysis in analyses:
        run = analysis.run
        still = sum(point.change.is_nothing for point in run.points)
        zeros = sum(p.change.zero_rows for p in run.points if p.moment == len(run.moments) - 1)
        if still:
            notes.append(
                f"{run.name}: {_count(still, 'point')} left out, where a weight has not moved."
            )
        if zeros:
            notes.append(f"{run.name}: {_count(zeros, 'row')} of zeros left out of dD.")
    if len({analysis.run.sites for analysis in analyses}) > 1:
        notes.append("The runs changed different weights: compare kind by kind, or use --match.")
    console.print()
    for note in notes:
        console.print(note, style="dim", highlight=False)


def _cells(correlation: Correlation) -> Iterable[str]:
    yield f"{correlation.points:,}"
    if correlation.pearson is None or correlation.spearman is None:
        yield from (correlation.reason, "")
    else:
        yield from (str(correlation.pearson), str(correlation.spearman))


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'s' * (number != 1)}"


def _write(
    folder: Path,
    base: str,
    match: str | None,
    analyses: Sequence[Analysis],
    layout: GridLayout,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        "base": base,
        "match": match,
        "runs": [_describe(analysis, layout) for analysis in analyses],
    }
    write_json(folder / RESULTS_FILE, results)
    title = "Change of magnitude and direction"
    if match is not None:
        title += f"\n{shorten(match)}"
    figure = change_scatter(
        [analysis.run for analysis in analyses],
        [analysis.pooled for analysis in analyses],
        layout,
        title=title,
    )
    figure.savefig(folder / FIGURE_FILE, dpi=_DOTS_PER_INCH)


def _describe(analysis: Analysis, layout: GridLayout) -> dict[str, Any]:
    run = analysis.run
    return {
        "name": run.name,
        "folder": str(run.folder),
        "correlation": asdict(analysis.pooled),
        "by_kind": {kind: asdict(found) for kind, found in analysis.kinds.items()},
        "by_checkpoint": {label: asdict(found) for label, found in analysis.moments.items()},
        "points": [
            {
                "site": point.site,
                "kind": _kind_of(point.site, layout),
                "layer": layout.rows[layout.cells[point.site].row],
                "step": run.moments[point.moment].step,
                "moved": not point.change.is_nothing,
                **asdict(point.change),
            }
            for point in run.points
        ],
    }
