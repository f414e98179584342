"""Two runs or adapters side by side: ``rankflow inspect --diff A B``."""

from pathlib import Path

from rich.console import Console

from rankflow.errors import RankFlowError
from rankflow.export.card import tell_storage
from rankflow.export.inspect import CONFIG, inspect_adapter
from rankflow.report.difference import Allocation, Difference, allocation_after, find_difference
from rankflow.report.difference_table import difference_table, tell_unshared, totals_table
from rankflow.report.events import EVENTS_FILE, read_run


def compare_folders(a: Path, b: Path, *, png: Path | None, console: Console) -> Difference:
    """Print how the ranks of two runs or adapters differ, and draw it if asked for.

    A run counts what it trained after its last event, an adapter what its file holds.

    Args:
        a: A folder.
        b: The other one; differences are B - A.
        png: A file for the heatmap.
        console: Where to print.

    Returns:
        What was printed.

    Raises:
        RankFlowError: A folder holds neither a run nor an adapter.
    """
    first, second = read_allocation(a), read_allocation(b)
    difference = find_difference(first, second)
    console.print(f"A  {a}\nB  {b}\n", highlight=False, soft_wrap=True)
    console.print(difference_table(difference, width=console.width))
    for line in tell_unshared(difference):
        console.print(f"\n{line}", highlight=False)
    if difference.gained or difference.lost:
        console.print("\n• a magnitude in B only   ◦ in A only", highlight=False)
    console.print()
    console.print(totals_table(first, second))
    for letter, allocation in (("A", first), ("B", second)):
        if allocation.note:
            console.print(f"\n{letter}: {allocation.note}", highlight=False)
    if png is not None:
        from rankflow.report.heatmap import difference_heatmap

        difference_heatmap(difference, title=f"Rank: {b} - {a}").savefig(png)
        console.print(f"\nHeatmap written to {png}", soft_wrap=True)
    return difference


def read_allocation(folder: Path) -> Allocation:
    """Return where the parameters of a run or of an adapter are.

    Raises:
        RankFlowError: The folder holds neither.
    """
    if holds_adapter(folder):
        summary = inspect_adapter(folder)
        magnitudes = frozenset(site.name for site in summary.sites if site.has_magnitude)
        trained, stored = summary.trained_parameters, summary.parameters
        note = "" if trained in (None, stored) else tell_storage(trained, stored)
        return Allocation(summary.ranks, magnitudes, stored, note)
    return allocation_after(read_run(folder)[-1])


def holds_adapter(folder: Path) -> bool:
    """Tell the folder of an adapter from that of a run.

    Raises:
        RankFlowError: It is neither.
    """
    if (folder / CONFIG).is_file():
        return True
    if (folder / EVENTS_FILE).is_file():
        return False
    raise RankFlowError(
        f"{folder} holds neither {CONFIG} nor {EVENTS_FILE}; name the folder of an adapter or a run"
    )
