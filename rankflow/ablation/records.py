"""The frozen records of an ablation: what one cell is, and what came out of it.

A cell is one training run: a method, at a budget, on a task, with a learning rate and a seed. Its
result is one JSON file, and every table, figure and verdict is made from such files alone.
"""

import zlib
from dataclasses import dataclass, field
from typing import Literal

Split = Literal["validation", "test"]
Status = Literal["done", "failed", "unsupported"]


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """One method at one budget on one task."""

    task: str
    budget: str
    method: str

    @property
    def path(self) -> str:
        """What a pattern of the command line is matched with."""
        return f"{self.task}/{self.budget}/{self.method}"

    def cell(self, split: Split, seed: int, rate: float, scaling: float = 1.0) -> "Cell":
        """Return one of its cells."""
        return Cell(self.task, self.budget, self.method, split, seed, rate, scaling)


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """One training run of an ablation.

    Attributes:
        task: Name of the task in the spec.
        budget: Label of the budget in the spec, such as ``rank 4``.
        method: Name of the method.
        split: What the finished model is judged on: ``validation`` while tuning, else ``test``.
        seed: Number of the repetition; see ``training_seed``.
        rate: Learning rate of what the method trains; a task head has its own.
        scaling: Factor on the adapter's scale (``lora_alpha / r``), 1 unless it is tuned.
    """

    task: str
    budget: str
    method: str
    split: Split
    seed: int
    rate: float
    scaling: float = 1.0

    @property
    def place(self) -> Place:
        """Where it belongs."""
        return Place(self.task, self.budget, self.method)

    @property
    def training_seed(self) -> int:
        """What the run is seeded with: another number for every task.

        Else a lucky seed would be lucky on all tasks at once, and the pairs of a comparison would
        not be independent. All methods and learning rates of a task share it.

        >>> Cell("clinc150", "rank 4", "lora", "test", 0, 0.004).training_seed
        2992251037
        """
        return zlib.crc32(f"{self.task}/{self.seed}".encode())


@dataclass(frozen=True, slots=True)
class Parameters:
    """What a method trained, counted exactly; a task head is counted apart.

    Attributes:
        budget: Parameters that it was allowed.
        final: Parameters that it adapts the model with at the end.
        peak: Most parameters that it trained at a time.
        stored: Parameters in the files of its adaptation, frozen ones that cannot be made again
            included; 0 if it was not written.
        head: Parameters of the task head, which trains with every method.
        size: What was chosen to fit the budget (rank, bottleneck, virtual tokens, block size);
            None where the method has no size, or RankFlow's budget fits it.
    """

    budget: int
    final: int
    peak: int
    stored: int
    head: int
    size: int | None = None


@dataclass(frozen=True, slots=True)
class Latency:
    """Median time of one forward pass in evaluation mode, in seconds, interleaved with the base.

    Attributes:
        base: The untouched base model.
        unmerged: The model as it was trained.
        merged: The model with its adaptation folded in; None where that cannot be done.
    """

    base: float
    unmerged: float
    merged: float | None


@dataclass(frozen=True, slots=True)
class Forgetting:
    """What the model could do before, measured before and after.

    Attributes:
        measure: What is measured, e.g. ``similarity`` (Spearman, higher is better) or
            ``perplexity`` (lower is better).
        before: Value of the base model.
        after: Value of the trained model.
    """

    measure: str
    before: float
    after: float


@dataclass(frozen=True, slots=True)
class RankMoment:
    """The ranks after one event.

    Attributes:
        step: Optimizer steps taken.
        spent: Trainable adapter parameters.
        ranks: Rank of each site, in site order.
        magnitudes: Sites that train a magnitude, by index in site order.
    """

    step: int
    spent: int
    ranks: tuple[int, ...]
    magnitudes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RankHistory:
    """How the ranks of a run moved.

    Attributes:
        sites: Name of every site, in site order.
        moments: The ranks at the start, and after every event that moved one.
    """

    sites: tuple[str, ...]
    moments: tuple[RankMoment, ...]


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a result comes from.

    Attributes:
        digest: Identifies everything that decides the result: cell, method, task, training.
        versions: Version by package.
        commit: Git commit of the working directory; empty outside a repository.
        machine: Processor and, where one is used, accelerator.
        finished: Time of the end, ISO 8601, UTC.
    """

    digest: str
    versions: dict[str, str]
    commit: str
    machine: str
    finished: str


@dataclass(frozen=True, slots=True)
class CellResult:
    """What came out of one cell.

    Attributes:
        cell: What was run.
        status: ``unsupported`` where the method cannot run on this model, ``failed`` after an
            error; only a ``done`` cell has measurements.
        provenance: Where it comes from.
        reason: Why it is unsupported or failed; empty if done.
        metrics: By name: ``nll`` (nats), and ``accuracy`` or ``perplexity`` where they apply; NaN
            where training diverged.
        parameters: What was trained.
        seconds_per_step: Wall time of an optimizer step (mean over those since the run last
            began).
        cpu_seconds_per_step: The same in CPU time of the process.
        peak_bytes: Most bytes of one training step's tensors, weights and optimizer state left
            out; None if it was not measured.
        latency: Inference; None if it was not measured.
        forgetting: None if the task has no measure of it.
        ranks: None for methods without rank-1 components.
    """

    cell: Cell
    status: Status
    provenance: Provenance
    reason: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: Parameters | None = None
    seconds_per_step: float | None = None
    cpu_seconds_per_step: float | None = None
    peak_bytes: int | None = None
    latency: Latency | None = None
    forgetting: Forgetting | None = None
    ranks: RankHistory | None = None


def reaches(parameters: int, budget: int, tolerance: float = 0.05) -> bool:
    """Tell whether a number of parameters is that of the budget, within a relative tolerance.

    >>> reaches(96, 100), reaches(90, 100), reaches(104, 100)
    (True, False, True)
    """
    return abs(parameters - budget) <= tolerance * budget
