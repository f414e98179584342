"""Scores of methods on tasks and seeds, and the paired differences between them."""

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rankflow.errors import RankFlowError

Cell = tuple[str, str, int]
"""Method, task and seed."""

_SHOWN = 5  # faulty cells that an error names


@dataclass(frozen=True, eq=False, slots=True)
class Pairs:
    """Contrasts between methods, one for each task and seed that all of them finished.

    Args:
        difference: Contrasts ``(n,)``, all finite, in the metric's unit or as log ratios.
        task: Name of each one's task ``(n,)``.
        seed: Each one's seed ``(n,)``.
        broken: Tasks and seeds left out because the score of some method is not finite.
        diverged: How many of those are each method's own doing, by method.
        unpaired: Tasks and seeds left out because some of the methods were not measured there.
    """

    difference: NDArray[np.float64]
    task: NDArray[np.str_]
    seed: NDArray[np.int64]
    broken: int
    diverged: Mapping[str, int]
    unpaired: int

    def __len__(self) -> int:
        return len(self.difference)


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """One metric of every cell that was measured, all at one budget.

    Args:
        values: Score by method, task and seed. A cell that diverged holds NaN or an infinity; a
            cell that was not measured is absent.
        metric: What the scores are, as a sentence would call it: ``"test NLL"``.
        higher_is_better: Whether a higher score is better.
        relative: Compare by log ratios, so that tasks of different scales can be averaged. 100
            times a log ratio is a change in per cent, to first order.

    Raises:
        RankFlowError: If ratios are asked for and some finite score is not positive.
    """

    values: Mapping[Cell, float]
    metric: str
    higher_is_better: bool = False
    relative: bool = False

    def __post_init__(self) -> None:
        if not self.relative:
            return
        wrong = [
            f"{'/'.join(map(str, cell))} = {value}"
            for cell, value in self.values.items()
            if math.isfinite(value) and value <= 0
        ]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise RankFlowError(
                f"ratios need positive scores of {self.metric}, got {', '.join(wrong[:_SHOWN])}"
                f"{more}; compare by differences instead (relative=False)"
            )

    def pairs(self, ours: str, theirs: str) -> Pairs:
        """Return our scores minus theirs, paired by task and seed.

        With ``relative`` it is ``log(ours / theirs)``. The sign is as measured: negative where our
        score is the lower one, whether that is good or bad.

        Args:
            ours: A method.
            theirs: Another method.

        Raises:
            RankFlowError: If one is not in the table, they are the same, or share no cell.

        >>> nll = {("lora", "toy", 0): 0.50, ("dora", "toy", 0): 0.40}
        >>> ScoreTable(nll, "test NLL").pairs("dora", "lora").difference.round(6)
        array([-0.1])
        """
        if ours == theirs:
            raise RankFlowError(
                f"a method cannot be compared with itself, got {ours!r} twice; name another one"
            )
        return self.contrast({ours: 1, theirs: -1})

    def contrast(self, coefficients: Mapping[str, int]) -> Pairs:
        """Return the weighted sum of methods' scores at every task and seed.

        Args:
            coefficients: Weight of each method's score, or of its logarithm with ``relative``.

        Raises:
            RankFlowError: If a method is not in the table, or they share no task and seed.
        """
        measured = {method: self._cells_of(method) for method in coefficients}
        shared = sorted(set.intersection(*map(set, measured.values())))
        if not shared:
            raise RankFlowError(
                f"{_listed(coefficients)} share no task and seed, so nothing can be paired; "
                f"measure them on the same tasks with the same seeds"
            )
        scores = np.array([[measured[m][place] for place in shared] for m in coefficients])
        finite = np.isfinite(scores)  # (methods, places)
        whole = finite.all(axis=0)
        kept = scores[:, whole]
        weights = np.array(list(coefficients.values()), dtype=np.float64)
        places = [place for place, keep in zip(shared, whole, strict=True) if keep]
        return Pairs(
            difference=weights @ (np.log(kept) if self.relative else kept),
            task=np.array([task for task, _ in places], dtype=np.str_),
            seed=np.array([seed for _, seed in places], dtype=np.int64),
            broken=int((~whole).sum()),
            diverged=dict(zip(coefficients, map(int, (~finite).sum(axis=1)), strict=True)),
            unpaired=len(set.union(*map(set, measured.values()))) - len(shared),
        )

    def _cells_of(self, method: str) -> dict[tuple[str, int], float]:
        found = {(t, s): value for (m, t, s), value in self.values.items() if m == method}
        if found:
            return found
        known = sorted({m for m, _, _ in self.values})
        near = difflib.get_close_matches(method, known, n=1, cutoff=0.0)
        raise RankFlowError(
            f"the table of {self.metric} has no method {method!r}; "
            + (f"did you mean {near[0]!r}? It has {_listed(known)}" if near else "it is empty")
        )


def _listed(names: Mapping[str, int] | list[str]) -> str:
    return ", ".join(map(repr, names))
