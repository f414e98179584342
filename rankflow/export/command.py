"""The command ``rankflow compress``: from what was typed to what is shown and written."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from rich.console import Console
from rich.text import Text

from rankflow.errors import RankFlowError, SpecError, brief
from rankflow.export.compress_folder import BaseReader, compress_folder
from rankflow.export.compression import Compression
from rankflow.export.inspect import CONFIG, WEIGHTS
from rankflow.report.curve import curve_table, draw_curve
from rankflow.report.terminal import rank_table
from rankflow.specs.budget import BudgetSpec, load_budget


def parse_budget(
    budget: str | None, rank: float | None, params: int | None, error: float | None
) -> BudgetSpec | int | None:
    """Return the budget that the options stand for; None where an error takes its place.

    Args:
        budget: A number of parameters, a preset's name, or the path of a budget.
        rank: The target as a rank of plain LoRA.
        params: The target in parameters.
        error: The largest error.

    Raises:
        SpecError: The options contradict each other, or there is none.
    """
    given = {"--rank": rank, "--params": params, "--error": error}
    targets = [name for name, value in given.items() if value is not None]
    number = _whole(budget)
    if number is not None:
        targets.append("--budget")
    if len(targets) > 1:
        raise SpecError(f"{' and '.join(targets)} each say how much may be left; give one of them")
    if error is not None and budget is not None:
        raise SpecError("--error takes the place of a budget; leave --budget out")
    if number is not None:
        return number
    overrides = {k: v for k, v in (("rank", rank), ("params", params)) if v is not None}
    if budget is not None:
        return load_budget(budget, **overrides)
    if overrides:
        return load_budget("reallocate", **overrides)
    if error is None:
        raise SpecError("say how much may be left: --budget, --rank, --params, or --error")
    return None


def run_compress(
    source: Path,
    output: Path,
    budget: BudgetSpec | int | None,
    *,
    error: float | None,
    base: BaseReader,
    png: Path | None,
    ranks: Path | None,
    console: Console,
) -> Compression:
    """Compress an adapter, write it, and show what that cost.

    Args:
        source: Its folder.
        output: The folder to write.
        budget: What may be left; None where an error decides.
        error: The largest relative error allowed.
        base: Reads the base model.
        png: Where to draw the curve.
        ranks: Where to write the ranks as a budget for a new run.
        console: Where to print.

    Raises:
        RankFlowError: The adapter cannot be compressed so; nothing is written.
    """
    result = compress_folder(source, output, budget, error=error, base=base)
    console.print(curve_table(result.curve, result.parameters_before))
    console.print(Text("\n"), rank_table(result.ranks, width=console.width), sep="")
    console.print(
        f"\n{result.parameters:,} of {result.parameters_before:,} parameters "
        f"({result.parameters / result.parameters_before:.0%}) at a relative error of "
        f"{result.error:.4f}{', chosen by the loss' if result.worth == 'loss' else ''}",
        highlight=False,
        soft_wrap=True,
    )
    if png is not None:
        figure = draw_curve(
            result.curve,
            whole=result.parameters_before,
            parameters=result.parameters,
            error=result.error,
        )
        figure.savefig(png)
        console.print(f"Curve drawn in {png}", soft_wrap=True)
    if ranks is not None:
        ranks.write_text(budget_text(result.frozen_budget), encoding="utf-8")
        console.print(f"Ranks written to {ranks}, a budget for a new run", soft_wrap=True)
    console.print(f"Stock PEFT adapter written to {output}", soft_wrap=True)
    return result


def find_source(adapter: str) -> Path:
    """Return the folder of an adapter, fetched from the hub where there is no such folder here.

    Raises:
        RankFlowError: There is neither.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        return Path(snapshot_download(adapter, allow_patterns=[CONFIG, WEIGHTS]))
    except (HFValidationError, HfHubHTTPError, OSError) as error:
        raise RankFlowError(
            f"{adapter} is no folder here, and cannot be fetched from the hub: {brief(error)}; "
            "name a folder, or fetch the adapter while there is a connection, since the hub's "
            "cache is read without one"
        ) from error


def budget_text(spec: BudgetSpec) -> str:
    """Return a frozen budget as a TOML file."""
    values = spec.model_dump(exclude_unset=True, exclude={"ranks"})
    lines = [f"{key} = {json.dumps(value)}" for key, value in values.items() if value is not None]
    ranks = [f"{json.dumps(site)} = {rank}" for site, rank in spec.ranks.items()]
    return "\n".join([*lines, "", "[ranks]", *ranks]) + "\n"


def _whole(text: str | None) -> int | None:
    """Return a number of parameters, such as 20000 or 20_000; None for anything else."""
    digits = (text or "").replace("_", "").replace(",", "")
    return int(digits) if digits.isdecimal() else None
