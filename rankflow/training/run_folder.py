"""The folder of a run.

A run always starts in a fresh folder. One that is in the way, finished or not, is moved aside
rather than overwritten, so that the same command can be given again and nothing is lost::

    runs/quickstart      the run that starts now
    runs/quickstart.1    the one before the last
    runs/quickstart.2    the last one

A folder that no run wrote is never touched.
"""

import json
import os
from itertools import count
from pathlib import Path
from typing import Any

from rankflow.errors import SpecError
from rankflow.specs.run import RunSpec

SPEC_FILE = "run.json"
METRICS_FILE = "metrics.json"
EVENTS_FILE = "events.jsonl"
ADAPTER_FOLDER = "adapter"


def start_folder(spec: RunSpec) -> tuple[Path, Path | None]:
    """Make the run's folder and write the resolved spec into it.

    Returns:
        The folder, and where an earlier run that held its name went.

    Raises:
        SpecError: Something that is not a run holds the folder's name.
    """
    folder = Path(spec.train["output_dir"])
    moved = _move_aside(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SPEC_FILE, spec.model_dump(mode="json"))
    return folder, moved


def write_json(path: Path, values: Any) -> None:
    """Write a file that is either whole or not there."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def _move_aside(folder: Path) -> Path | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / SPEC_FILE).is_file():
        raise SpecError(
            f"[train] output_dir = '{folder}': it exists and no run wrote it (it has no "
            f"{SPEC_FILE}); choose another folder"
        )
    free = next(
        path for n in count(1) if not (path := folder.with_name(f"{folder.name}.{n}")).exists()
    )
    folder.rename(free)
    return free
