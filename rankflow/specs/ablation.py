"""The ablation spec: methods, budgets, tasks and seeds, and what is compared, in one TOML file.

``[model]``, ``[data]``, ``[train]`` and ``[forgetting]`` are what all tasks have in common;
``[tasks.NAME.model]`` and the like say what differs. ``[method.NAME]`` declares a variant of a
method that there is. What is compared is declared here, before anything has run.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Field, PositiveFloat

from rankflow.specs.ablation_task import SOURCES, TaskSpec, check_tasks
from rankflow.specs.budget import Factor, Size
from rankflow.specs.overrides import apply_overrides
from rankflow.specs.reading import (
    ABSENT,
    Fault,
    Seed,
    Spec,
    SpecT,
    Table,
    check,
    dotted,
    raise_faults,
    read_toml,
    suggest,
)
from rankflow.specs.run import check_adapter_table


def _list_seeds(seeds: object) -> object:
    """Number the seeds where only their number was given."""
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds > 0:
        return tuple(range(seeds))
    listed = tuple(seeds) if isinstance(seeds, list | tuple) else ()
    if not listed or not all(type(seed) is int and 0 <= seed < 2**32 for seed in listed):
        raise ValueError("must be a number of seeds, or a list of seeds of 0 or more")
    return tuple(dict.fromkeys(listed))


Name = Annotated[str, Field(pattern=r"^\w[\w.\-]*$")]
Metric = Literal["nll", "accuracy", "perplexity", "excess"]
Seeds = Annotated[tuple[int, ...], BeforeValidator(_list_seeds)]

HIGHER_IS_BETTER: Final[Mapping[str, bool]] = {
    "nll": False,
    "accuracy": True,
    "perplexity": False,
    "excess": False,
}
SHARES: Final = frozenset({"accuracy", "excess"})
"""Metrics that are shares of 1: they are compared by difference, others by ratio."""


class BudgetPoint(Spec):
    """One budget of an ablation, and the seeds that are run at it.

    Attributes:
        rank: As many parameters as plain LoRA of this rank trains on the same sites.
        params: Trainable parameters.
        seeds: The seeds, or their number (0, 1, ...); None for the ablation's.
    """

    rank: Factor | None = None
    params: Size | None = None
    seeds: Seeds | None = None

    @property
    def label(self) -> str:
        """What people call it.

        >>> BudgetPoint(rank=4).label, BudgetPoint(params=41472).label
        ('rank 4', '41,472 parameters')
        """
        return f"rank {self.rank:g}" if self.rank is not None else f"{self.params:,} parameters"

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        targets = {"rank": self.rank, "params": self.params}
        if (self.rank is None) == (self.params is None):
            given = {key: ABSENT if value is None else value for key, value in targets.items()}
            yield Fault(given, "set one of these")


class TuningSpec(Spec):
    """How learning rates are chosen: on the validation split, with seeds of its own.

    From the first rates on, the grid goes on in factors of 2 until a worse one is measured on
    either side of the best.

    Attributes:
        seeds: Seeds that no reported cell has.
        rates: Learning rates to start with; none for the usual one of each method and its double.
        scalings: Whether the adapter's scale is tuned too, for methods that ask for it.
        widest: Factor around the first rates beyond which tuning does not go.
        enabled: False takes the first rate of each method as it is.
    """

    seeds: Annotated[list[Seed], Field(min_length=1)] = Field(default_factory=lambda: [100])
    rates: list[PositiveFloat] = Field(default_factory=list)
    scalings: bool = True
    widest: Annotated[float, Field(ge=1)] = 16.0
    enabled: bool = True

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        for key, values in (("seeds", self.seeds), ("rates", self.rates)):
            if len(set(values)) < len(values):
                yield Fault({key: values}, "names one twice")


class MethodSpec(Spec):
    """A variant of a method.

    Attributes:
        like: The method that it is a variant of.
        use_dora: Whether a steered adapter is DoRA.
        budget: Other keys of the budget of a steered method.
        factor: Its budget as a multiple of the ablation's, for controls.
        follows: The method whose learned ranks the control retrains.
        config: Other keywords of the PEFT config of a method that is PEFT's.
        rate: Learning rate to start tuning with.
    """

    like: Name = Field(description="name the method that it is a variant of")
    use_dora: bool | None = None
    budget: Table = Field(default_factory=dict)
    factor: PositiveFloat | None = None
    follows: Name | None = None
    config: Table = Field(default_factory=dict)
    rate: PositiveFloat | None = None


class AblationSpec(Spec):
    """One ablation.

    Attributes:
        name: Name of the ablation.
        description: What it asks, for people.
        methods: Names of methods, built in or declared in ``[method.NAME]``.
        budgets: The budgets.
        tasks: The tasks.
        seeds: The seeds.
        judge: The metric that comparisons are about.
        compare: Pairs of methods, ours first; declared before anything has run.
        interaction: Four methods: neither, only the first part, only the second, both.
        margin: Differences below this are called equivalent: a share of the metric, or
            absolute where that is a share itself (accuracy, excess).
        alpha: Level of the tests.
        adapter: Keywords of ``peft.LoraConfig`` of all adapters.
        head_rate: Learning rate of the task head.
        tuning: How learning rates are chosen.
        variants: The declared variants, by name.
        digest: Identifies the whole spec.
    """

    name: str
    description: str
    methods: tuple[str, ...]
    budgets: tuple[BudgetPoint, ...]
    tasks: tuple[TaskSpec, ...]
    seeds: tuple[int, ...]
    judge: Metric
    compare: tuple[tuple[str, str], ...]
    interaction: tuple[str, ...] | None
    margin: float
    alpha: float
    adapter: Table
    head_rate: float
    tuning: TuningSpec
    variants: dict[str, MethodSpec]
    digest: str

    def task(self, name: str) -> TaskSpec:
        """Return the task of a name."""
        return next(task for task in self.tasks if task.name == name)

    def budget(self, label: str) -> BudgetPoint:
        """Return the budget of a label."""
        return next(budget for budget in self.budgets if budget.label == label)

    def seeds_of(self, budget: BudgetPoint) -> tuple[int, ...]:
        """Return the seeds that are reported at a budget."""
        return self.seeds if budget.seeds is None else budget.seeds

    def variant(self, method: str) -> MethodSpec:
        """Return what a method is a variant of; itself if it was not declared."""
        return self.variants.get(method, MethodSpec(like=method))


class _Document(Spec):
    """The top of an ablation file; its tables are not looked into yet."""

    name: Name
    description: str = ""
    methods: Annotated[list[Name], Field(min_length=1)] = Field(
        description="list the methods; `rankflow ablate --list` names them"
    )
    budgets: Annotated[list[Any], Field(min_length=1)] = Field(
        description="list ranks, or tables such as { rank = 4, seeds = 5 }"
    )
    seeds: Seeds = (0, 1, 2, 3, 4)
    judge: Metric = "nll"
    compare: list[Annotated[list[Name], Field(min_length=2, max_length=2)]] = Field(
        default_factory=list
    )
    interaction: Annotated[list[Name], Field(min_length=4, max_length=4)] | None = None
    margin: PositiveFloat = 0.01
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    head_rate: PositiveFloat = 3e-3
    tuning: Table = Field(default_factory=dict)
    adapter: Table = Field(default_factory=dict)
    method: dict[Name, Table] = Field(default_factory=dict)
    tasks: Annotated[dict[Name, Table], Field(min_length=1)] = Field(
        description="add [tasks.NAME], with the tables model and data unless all tasks share them"
    )
    model: Table = Field(default_factory=dict)
    data: Table = Field(default_factory=dict)
    train: Table = Field(default_factory=dict)
    forgetting: Table = Field(default_factory=dict)
    teacher: Table = Field(default_factory=dict)

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        pairs = [("compare", pair) for pair in self.compare]
        for key, group in [*pairs, ("interaction", self.interaction or [])]:
            for method in group:
                if method not in self.methods:
                    yield Fault(
                        {key: group, "methods": self.methods},
                        f"{key} names a method that is not run; {suggest(method, self.methods)}",
                    )
            if len(set(group)) < len(group):
                yield Fault({key: group}, "names a method twice")
        for name, table in self.method.items():
            if name not in self.methods:
                yield Fault(
                    {"method": {name: table}, "methods": self.methods}, "is declared and not run"
                )


def load_ablation(
    path: str | Path, overrides: Sequence[str] = (), folder: Path | None = None
) -> AblationSpec:
    """Load an ablation spec.

    Args:
        path: A TOML file.
        overrides: Texts such as ``train.max_steps=20``; values are TOML, or else strings. A source
            of the data replaces the other source.
        folder: Where relative paths of data and models start; None for the spec's folder.

    Raises:
        SpecError: Anything is wrong with it; all faults are listed.
    """
    path = Path(path)
    written = {"name": path.stem} | read_toml(path)
    content, faults = apply_overrides(written, overrides, {"data": SOURCES})
    document, found = check(_Document, content)
    faults += found
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    adapter, found = check_adapter_table(tables.get("adapter", {}))
    faults += [fault.under("adapter") for fault in [*found, *_adapter_faults(adapter)]]
    tuning, found = check(TuningSpec, tables.get("tuning", {}))
    faults += [fault.under("tuning") for fault in found]
    variants = _check_all(MethodSpec, tables.get("method", {}), "method", faults)
    budgets = _check_budgets(content.get("budgets"), faults)
    tasks, found = check_tasks(content, folder or path.parent)
    faults += found
    faults += _judge_faults(content.get("judge", "nll"), tasks)
    if document is not None and tuning is not None:
        faults += _seed_faults(document.seeds, budgets, tuning)
    raise_faults(f"ablation {str(path)!r}{' with overrides' if overrides else ''}", faults)
    assert document is not None
    assert tuning is not None
    return AblationSpec(
        name=document.name,
        description=document.description,
        methods=tuple(dict.fromkeys(document.methods)),
        budgets=budgets,
        tasks=tasks,
        seeds=document.seeds,
        judge=document.judge,
        compare=tuple(dict.fromkeys((ours, theirs) for ours, theirs in document.compare)),
        interaction=tuple(document.interaction) if document.interaction else None,
        margin=document.margin,
        alpha=document.alpha,
        adapter=adapter,
        head_rate=document.head_rate,
        tuning=tuning,
        variants=variants,
        digest=digest_of(content),
    )


def digest_of(content: object) -> str:
    """Return 12 hexadecimal digits that identify a value; the order of its keys does not matter."""
    text = json.dumps(content, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_budgets(written: object, faults: list[Fault]) -> tuple[BudgetPoint, ...]:
    """Check ranks and tables; whatever else a document says is reported as a budget's fault."""
    tables: dict[str, Table] = {}
    for index, budget in enumerate(written if isinstance(written, list) else []):
        is_number = isinstance(budget, int | float) and not isinstance(budget, bool)
        if is_number or isinstance(budget, dict):
            tables[str(index)] = {"rank": float(budget)} if is_number else budget
        else:
            remedy = "must be a rank, or a table such as { rank = 4, seeds = 5 }"
            faults.append(Fault({f"budgets.{index}": budget}, remedy))
    budgets = _check_all(BudgetPoint, tables, "budgets", faults)
    labels = [budget.label for budget in budgets.values()]
    for label in dict.fromkeys(labels):
        if labels.count(label) > 1:
            faults.append(Fault({"budgets": written}, f"{label} is there twice; keep one of them"))
    return tuple(budgets.values())


def _check_all(
    model: type[SpecT], tables: Mapping[str, Any], above: str, faults: list[Fault]
) -> dict[str, SpecT]:
    specs = {}
    for name, table in tables.items():
        if not isinstance(table, dict):
            continue  # the document's own fault
        spec, found = check(model, table)
        faults += [fault.under(dotted(above, name)) for fault in found]
        if spec is not None:
            specs[name] = spec
    return specs


def _adapter_faults(adapter: Table) -> Iterator[Fault]:
    for key, method in (("use_dora", "dora"), ("use_rslora", "rslora")):
        if key in adapter:
            yield Fault({key: adapter[key]}, f"is decided by the method; list '{method}' instead")


def _judge_faults(judge: object, tasks: Sequence[TaskSpec]) -> Iterator[Fault]:
    for task in tasks:
        if judge in HIGHER_IS_BETTER and judge not in task.metrics:
            yield Fault(
                {"judge": judge},
                f"the task '{task.name}' measures {' and '.join(task.metrics)}; judge one that all "
                "tasks have",
            )


def _seed_faults(
    seeds: Sequence[int], budgets: Sequence[BudgetPoint], tuning: TuningSpec
) -> Iterator[Fault]:
    reported = {*seeds, *(seed for budget in budgets for seed in budget.seeds or ())}
    if tuning.enabled and not reported.isdisjoint(tuning.seeds):
        yield Fault(
            {"tuning.seeds": tuning.seeds, "seeds": sorted(reported)},
            "no seed may be both tuned with and reported; choose other seeds for tuning",
        )
