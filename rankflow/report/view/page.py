"""The view of one run, or of several, as one HTML file that needs no other and no network."""

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from rankflow.durable import write_file
from rankflow.errors import RankFlowError
from rankflow.report.events import read_run
from rankflow.report.view.data import GridView, RunView, encode, view_grid, view_run
from rankflow.report.view.script import view_script


@dataclass(frozen=True, slots=True)
class PageView:
    """What the page holds.

    Attributes:
        runs: The runs, the first of which is shown first.
        layout: The places of the sites of all of them.
    """

    runs: list[RunView]
    layout: GridView


def render_page(runs: Sequence[RunView]) -> str:
    """Return the page as HTML.

    The page's own policy lets it run this script and nothing else, and load nothing.

    Args:
        runs: The runs, each with at least one event.
    """
    layout = view_grid(site for run in runs for site in run.sites)
    script = f"{view_script()}render();\n"
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'"
    title = escape(f"Rank flow of {' and '.join(run.name for run in runs)}")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n</head>\n<body>\n"
        '<script type="application/json" id="rankflow-data">'
        f"{_embed(PageView(list(runs), layout))}</script>\n"
        f'<script type="module">{script}</script>\n</body>\n</html>\n'
    )


def report_runs(folders: Sequence[Path], output: Path) -> Path:
    """Write the page of some runs to a file that is either whole or as it was before.

    Args:
        folders: Their folders; the first is shown, and the others can be compared with it.
        output: The file; its folder is made if it does not exist.

    Raises:
        RankFlowError: A folder has no events, or is named twice.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise RankFlowError(f"{folders[0]} is compared with itself; name another run")
    names = _name(folders)
    page = render_page(
        [view_run(name, read_run(folder)) for name, folder in zip(names, folders, strict=True)]
    )
    write_file(output, page)
    return output


def _name(folders: Sequence[Path]) -> list[str]:
    """Name each run by its folder, and by the folders above where two are called the same."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _embed(view: PageView) -> str:
    """Return JSON that cannot end the element that holds it, nor open a comment in it."""
    return encode(view).decode().replace("<", "\\u003c")
