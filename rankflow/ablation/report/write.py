"""Write a report: ``report.md``, ``report.html`` and the figures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankflow.ablation.records import CellResult
from rankflow.ablation.report.contents import compose
from rankflow.ablation.report.document import Picture
from rankflow.ablation.report.html import render_html
from rankflow.ablation.report.markdown import FIGURES, render_markdown
from rankflow.ablation.report.method import MethodWords
from rankflow.durable import new_folder, write_file
from rankflow.specs.ablation import AblationSpec


@dataclass(frozen=True, slots=True)
class Report:
    """The files of a report.

    Attributes:
        markdown: ``report.md``, which shows the figures beside it.
        html: ``report.html``, which needs no other file.
        figures: The figures, in the order of the report.
    """

    markdown: Path
    html: Path
    figures: tuple[Path, ...]


def write_report(
    spec: AblationSpec,
    results: Iterable[CellResult],
    folder: Path,
    methods: Mapping[str, MethodWords],
) -> Report:
    """Write the report of an ablation, finished or not, over an older one.

    The same results give the same Markdown, whatever their order and the time.

    Args:
        spec: The ablation.
        results: Its results.
        folder: Where to write; made if it is not there. Other files in it stay, those in its
            folder ``figures`` do not.
        methods: Each method in words, by name.

    Raises:
        RankFlowError: One seed has two results at one place.
    """
    document = compose(spec, results, methods)
    pictures = [block for block in document if isinstance(block, Picture)]
    folder.mkdir(parents=True, exist_ok=True)
    with new_folder(folder / FIGURES) as figures:
        for picture in pictures:
            (figures / f"{picture.name}.png").write_bytes(picture.png)
    report = Report(
        markdown=folder / "report.md",
        html=folder / "report.html",
        figures=tuple(folder / FIGURES / f"{picture.name}.png" for picture in pictures),
    )
    write_file(report.markdown, render_markdown(document))
    write_file(report.html, render_html(document, f"Ablation {spec.name}"))
    return report
