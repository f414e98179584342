"""The folder of a run.

A run always starts in a fresh folder. One that is in the way, finished or not, is moved aside
rather than overwritten, so that the same command can be given again and nothing is lost::

    runs/quickstart      the run that starts now
    runs/quickstart.1    the first one
    runs/quickstart.2    the second one

A run that resumes goes on in its own folder. A folder that no run wrote is never touched.
"""

import json
from itertools import count
from pathlib import Path
from typing import Any

from rankflow.durable import write_file
from rankflow.errors import SpecError
from rankflow.specs.run import RunSpec

SPEC_FILE = "run.json"
METRICS_FILE = "metrics.json"
ADAPTER_FOLDER = "adapter"


def check_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, or that something other than a run fills.

    Raises:
        SpecError: It is so.
    """
    for parent in folder.parents:
        if parent.is_file():
            raise SpecError(
                f"[train] output_dir = '{folder}': {parent} is a file, and a file lies where a "
                "folder is meant; name another path"
            )
    if _is_taken(folder) and not (folder / SPEC_FILE).is_file():
        raise SpecError(
            f"[train] output_dir = '{folder}': it exists and no run wrote it (it has no "
            f"{SPEC_FILE}); choose another folder"
        )


def start_folder(folder: Path, spec: RunSpec) -> Path | None:
    """Make the run's folder and write the resolved spec into it.

    Returns:
        Where an earlier run that held the name went, if there was one.
    """
    aside = None
    if _is_taken(folder):
        paths = (folder.with_name(f"{folder.name}.{n}") for n in count(1))
        aside = folder.rename(next(path for path in paths if not path.exists()))
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))
    return aside


def write_json(path: Path, values: Any) -> None:
    """Write a file that is either whole or not there."""
    write_file(path, json.dumps(values, indent=2) + "\n")


def _is_taken(folder: Path) -> bool:
    return folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
