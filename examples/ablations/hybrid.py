"""Which parts of a budget earn their keep: ranks that move, magnitudes, or both?

Every method of the table below spends one budget: as many parameters as plain LoRA of that rank
trains, magnitudes included. Its learning rate is tuned on the validation split with a seed of its
own; then three other seeds are judged on the test split, and compared seed by seed with plain LoRA
and plain DoRA.

    python examples/ablations/hybrid.py --data FOLDER --workers 2
    python examples/ablations/hybrid.py --data FOLDER --only 'clinc150/1/(lora|dora)$'
    python examples/ablations/hybrid.py --report-only

FOLDER holds ``<data set>/{train,validation,test}.jsonl`` with the keys ``text`` and ``label``. Each
result is appended to ``results.jsonl`` as it comes, and a finished cell is never run again: stop
and restart at will. ``RESULTS.md`` is written from that file. A new method is a new line of
METHODS; one whose definition changes is run anew. On one core a cell takes 15 to 25 seconds.
"""

import argparse
import json
import multiprocessing
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch
from cell import Cell, Method, run_cell
from report import render

KEPT = {"renormalise": "keep-scale"}
METHODS = {
    "lora": Method(use_dora=False, preset="fixed"),
    "dora": Method(use_dora=True, preset="fixed"),
    "hybrid": Method(use_dora=True, preset="hybrid"),
    "hybrid-keep-scale": Method(True, "hybrid", KEPT),
    "hybrid-no-growth": Method(True, "hybrid", {"recycle": 0.0, **KEPT}),
    "hybrid-constant": Method(True, "hybrid", {"start": 1.0, **KEPT}),
    "hybrid-all-magnitudes": Method(True, "hybrid", {"magnitude": "always", **KEPT}),
    "hybrid-lora": Method(False, "hybrid", {"magnitude": "always"}),
}
DATA = ("clinc150", "wordnet40")
RANKS = (1, 4)
STEPS = 150
SEEDS = (0, 1, 2)
TUNING_SEED = 100
RATES = (4e-3, 8e-3)  # where tuning starts
RATE_BOUNDS = (2.5e-4, 6.4e-2)


@dataclass(frozen=True)
class Task:
    """All cells of one method at one rank on one data set."""

    data: str
    rank: float
    name: str

    @property
    def path(self) -> str:
        """What ``--only`` matches."""
        return f"{self.data}/{self.rank:g}/{self.name}"

    def cell(self, rate: float, seed: int, split: str, steps: int) -> Cell:
        """Return one of its cells."""
        return Cell(self.data, self.rank, METHODS[self.name], rate, seed, split, steps)


def tune(nll_at: Callable[[float], float]) -> float:
    """Return the best learning rate in factors of two, with a worse one measured on either side.

    >>> tune(lambda rate: abs(rate - 0.03))
    0.032
    """
    found = {rate: nll_at(rate) for rate in RATES}
    while True:
        best = min(found, key=found.__getitem__)
        for beside in (best / 2, best * 2):
            if beside not in found and RATE_BOUNDS[0] <= beside <= RATE_BOUNDS[1]:
                found[beside] = nll_at(beside)
                break
        else:
            return best


def run_task(task: Task, folder: Path, results: Path, steps: int) -> str:
    """Tune a method and run its seeds; cells that are in the results already are not run.

    Returns:
        A line for people.
    """
    torch.set_num_threads(1)
    finished = {identify(row): row["nll"] for row in read_rows(results)}
    ran = 0

    def nll_of(cell: Cell) -> float:
        nonlocal ran
        settings = asdict(cell)
        key = identify(settings)
        if key not in finished:
            began = time.perf_counter()
            measured = asdict(run_cell(cell, folder))
            wall = time.perf_counter() - began
            append_row(results, settings | measured | {"wall": wall, "versions": _versions()})
            finished[key] = measured["nll"]
            ran += 1
        return finished[key]

    rate = tune(lambda rate: nll_of(task.cell(rate, TUNING_SEED, "validation", steps)))
    nlls = [nll_of(task.cell(rate, seed, "test", steps)) for seed in SEEDS]
    mean = sum(nlls) / len(nlls)
    return f"{task.path}: NLL {mean:.4f} at learning rate {rate:g} ({ran} cells run)"


def identify(row: Mapping) -> str:
    """Return what two rows of one cell have in common, and no others."""
    return json.dumps({field.name: row[field.name] for field in fields(Cell)}, sort_keys=True)


def read_rows(results: Path) -> list[dict]:
    """Read all results; none if there is no file yet."""
    if not results.exists():
        return []
    return [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]


def append_row(results: Path, row: dict) -> None:
    """Append a result by one write, so that processes may share the file."""
    with results.open("ab", buffering=0) as file:
        file.write((json.dumps(row) + "\n").encode())


def estimate(tasks: Sequence[Task], rows: Sequence[dict], workers: int, steps: int) -> str:
    """Say how long the tasks will take, told from the cells that have run."""
    mostly = len(RATES) + 1 + len(SEEDS)  # tuning tends to ask for one rate more
    leg = [row for row in rows if row["steps"] == steps]
    left = 0
    for task in tasks:
        method = asdict(METHODS[task.name])
        ran = [
            r for r in leg if (r["data"], r["rank"], r["method"]) == (task.data, task.rank, method)
        ]
        left += max(mostly - len(ran), 0)
    seconds = [row["wall"] for row in leg] or [20 * steps / STEPS]
    minutes = left * sum(seconds) / len(seconds) / workers / 60
    return f"about {left} cells to run: {minutes:.0f} minutes with {workers} processes"


def main() -> None:
    options = _parse()
    results = options.out / "results.jsonl"
    options.out.mkdir(parents=True, exist_ok=True)
    tasks = [Task(data, rank, name) for rank in RANKS for data in DATA for name in METHODS]
    tasks = [task for task in tasks if re.search(options.only, task.path)]
    if not options.report_only:
        print(estimate(tasks, read_rows(results), options.workers, options.steps), flush=True)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            arguments = (options.data, results, options.steps)
            for task in as_completed(pool.submit(run_task, task, *arguments) for task in tasks):
                print(task.result(), flush=True)
    text = render(read_rows(results), METHODS)
    (options.out / "RESULTS.md").write_text(text, encoding="utf-8")


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("rankflow", "torch", "peft", "transformers")}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the data sets")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="results' folder")
    parser.add_argument("--only", default="", help="regex for data/rank/method")
    parser.add_argument("--workers", type=int, default=1, help="processes, one core each")
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps of a cell")
    parser.add_argument("--report-only", action="store_true", help="only write RESULTS.md")
    return parser.parse_args()


if __name__ == "__main__":
    main()
