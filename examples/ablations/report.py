"""The tables of a comparison, from its rows of results."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from cell import BATCH, DTYPE, HEAD_RATE, JUDGED, SCALE, WARMUP, Method
from scipy import stats

BASELINES = ("lora", "dora")
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean, and half the width of its t confidence interval."""

    mean: float
    half_width: float


@dataclass(frozen=True)
class Outcome:
    """One method at one rank on one data set: its tuning, and the test rows at the best rate."""

    tuning: Mapping[float, float]  # learning rate -> validation NLL
    tests: Mapping[int, Mapping]  # seed -> row of results

    @property
    def rate(self) -> float:
        """The tuned learning rate."""
        return min(self.tuning, key=self.tuning.__getitem__)

    def column(self, key: str) -> list[float]:
        """One measured value of every seed."""
        return [row[key] for row in self.tests.values()]


def interval(values: Sequence[float]) -> Interval | None:
    """Return the mean of values with its t interval; None for fewer than two.

    >>> interval([0.5, 0.75])
    Interval(mean=0.625, half_width=1.588...)
    """
    if len(values) < 2:
        return None
    quantile = stats.t.ppf((1 + CONFIDENCE) / 2, df=len(values) - 1)
    return Interval(float(np.mean(values)), float(quantile * stats.sem(values)))


def gather(rows: Iterable[Mapping], method: Method) -> Outcome | None:
    """Return a method's outcome from the rows of one data set, rank and length; None if untuned."""
    mine = [row for row in rows if row["method"] == asdict(method)]
    tuning = {row["rate"]: row["nll"] for row in mine if row["split"] == "validation"}
    if not tuning:
        return None
    best = min(tuning, key=tuning.__getitem__)
    tests = {row["seed"]: row for row in mine if row["split"] == "test" and row["rate"] == best}
    return Outcome(tuning, dict(sorted(tests.items())))


def pair(ours: Outcome | None, theirs: Outcome | None, *, relative: bool = False) -> list[float]:
    """Return the differences of test NLL, ours minus theirs, of the seeds that both have."""
    if ours is None or theirs is None:
        return []
    shared = sorted(ours.tests.keys() & theirs.tests.keys())
    pairs = [(ours.tests[seed]["nll"], theirs.tests[seed]["nll"]) for seed in shared]
    return [a / b - 1 if relative else a - b for a, b in pairs]


def render(rows: Sequence[Mapping], methods: Mapping[str, Method]) -> str:
    """Return the results of the methods as they are defined now, as Markdown."""
    parts = [_describe(rows, methods)]
    for steps in sorted({row["steps"] for row in rows}):
        leg = [row for row in rows if row["steps"] == steps]
        blocks = {
            key: _outcomes([row for row in leg if (row["data"], row["rank"]) == key], methods)
            for key in sorted({(row["data"], row["rank"]) for row in leg})
        }
        parts += [f"## {steps} steps", _summarise(blocks, methods)]
        parts += [_tabulate(*key, outcomes) for key, outcomes in blocks.items()]
    return "\n\n".join(parts) + "\n"


def _outcomes(rows: Sequence[Mapping], methods: Mapping[str, Method]) -> dict[str, Outcome]:
    found = {name: gather(rows, method) for name, method in methods.items()}
    return {name: outcome for name, outcome in found.items() if outcome is not None}


def _describe(rows: Sequence[Mapping], methods: Mapping[str, Method]) -> str:
    versions = {", ".join(f"{k} {v}" for k, v in row["versions"].items()) for row in rows}
    definitions = [
        [name, "DoRA" if m.use_dora else "LoRA", m.preset, _words(m.overrides)]
        for name, m in methods.items()
    ]
    lines = [
        "# Ranks that move, magnitudes, or both",
        "Written by `hybrid.py` from `results.jsonl`. MiniLM, mean pooling, a linear head; all 36 "
        f"linear layers of the encoder are sites; scale {SCALE:g}, batch {BATCH}, AdamW without "
        f"weight decay, gradients clipped to 1, {WARMUP:.0%} warm-up, then linearly to 0, the "
        f"head's learning rate {HEAD_RATE:g}, no dropout, frozen weights in {DTYPE}.",
        "A budget of rank r is the parameters of plain LoRA of rank r, magnitudes included. The "
        "adapter's learning rate is tuned in factors of 2 on the validation split, with a seed of "
        f"its own. The tables hold other seeds, on {JUDGED:,} rows of the shuffled test split: "
        "mean ± standard deviation; differences are paired by seed, with "
        f"{CONFIDENCE:.0%} t intervals, and negative where the method is better.",
        *(f"Versions: {version}." for version in sorted(versions)),
        _table(["method", "adapter", "preset", "overrides"], definitions),
    ]
    return "\n\n".join(lines)


def _summarise(
    blocks: Mapping[tuple[str, float], Mapping[str, Outcome]], methods: Mapping[str, Method]
) -> str:
    """All data sets and ranks together, in per cent: what to choose a default by."""
    lines = []
    for name in methods:
        cells = [name]
        for baseline in BASELINES:
            differences = [
                100 * difference
                for outcomes in blocks.values()
                for difference in pair(outcomes.get(name), outcomes.get(baseline), relative=True)
            ]
            cells.append("" if name == baseline else _signed(interval(differences), digits=1))
        lines.append(cells)
    heads = ["method", *(f"test NLL against {baseline} (%)" for baseline in BASELINES)]
    return f"All data sets, ranks and seeds together:\n\n{_table(heads, lines)}"


def _tabulate(data: str, rank: float, outcomes: Mapping[str, Outcome]) -> str:
    tested = {name: outcome for name, outcome in outcomes.items() if outcome.tests}
    lines = [
        [
            name,
            _spread(outcome.column("nll"), digits=4),
            *(
                "" if name == baseline else _signed(interval(pair(outcome, outcomes.get(baseline))))
                for baseline in BASELINES
            ),
            _spread([100 * value for value in outcome.column("accuracy")], digits=1),
            f"{max(outcome.column('final')):,} / {max(outcome.column('peak')):,}",
            f"{np.mean(outcome.column('seconds')):.0f}",
            f"{outcome.rate:g}",
        ]
        for name, outcome in tested.items()
    ]
    heads = ["method", "test NLL", *(f"against {name}" for name in BASELINES), "accuracy (%)"]
    heads += ["parameters (final / peak)", "CPU s", "learning rate"]
    return f"### {data}, rank {rank:g}\n\n{_table(heads, lines)}\n\n{_tuning(outcomes)}"


def _tuning(outcomes: Mapping[str, Outcome]) -> str:
    rates = sorted({rate for outcome in outcomes.values() for rate in outcome.tuning})
    lines = [
        [name, *(f"{o.tuning[rate]:.4f}" if rate in o.tuning else "" for rate in rates)]
        for name, o in outcomes.items()
    ]
    return (
        f"Validation NLL while tuning:\n\n{_table(['method', *map('{:g}'.format, rates)], lines)}"
    )


def _table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _words(overrides: Mapping[str, object]) -> str:
    return ", ".join(f"{key} = {value}" for key, value in overrides.items())


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = np.std(values, ddof=1) if len(values) > 1 else np.nan
    return f"{np.mean(values):.{digits}f} ± {deviation:.{digits}f}"


def _signed(found: Interval | None, digits: int = 4) -> str:
    return "" if found is None else f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f}"
