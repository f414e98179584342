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

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from rankflow.specs.external import check_train
from rankflow.specs.overrides import apply_overrides
from rankflow.specs.reading import (
    Fault,
    Spec,
    SpecT,
    Table,
    check,
    dotted,
    raise_faults,
    read_toml,
    suggest,
)
from rankflow.specs.run import (
    DataSpec,
    Files,
    ModelSpec,
    Text,
    check_adapter_table,
    check_columns,
    resolve_paths,
)

SHARED: Final = ("model", "data", "train", "forgetting", "teacher")
_SOURCES: Final = ("name", "train")

Name = Annotated[str, Field(pattern=r"^[\w.\-]+$")]
Metric = Literal["nll", "accuracy", "perplexity", "excess"]

HIGHER_IS_BETTER: Final[Mapping[str, bool]] = {
    "nll": False,
    "accuracy": True,
    "perplexity": False,
    "excess": False,
}


class BudgetPoint(Spec):
    """One budget of an ablation, and the seeds that are run at it.

    Attributes:
        rank: As many parameters as plain LoRA of this rank trains on the same sites.
        params: Trainable parameters.
        seeds: Number of seeds (0, 1, ...), or the seeds; None for the ablation's.
    """

    rank: PositiveFloat | None = None
    params: PositiveInt | None = None
    seeds: PositiveInt | list[NonNegativeInt] | None = None

    @property
    def label(self) -> str:
        """What people call it.

        >>> BudgetPoint(rank=4).label, BudgetPoint(params=41472).label
        ('rank 4', '41,472 parameters')
        """
        return f"rank {self.rank:g}" if self.rank is not None else f"{self.params:,} parameters"

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        if (self.rank is None) == (self.params is None):
            yield Fault({"rank": self.rank, "params": self.params}, "set one of these")


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

    seeds: Annotated[list[NonNegativeInt], Field(min_length=1)] = Field(
        default_factory=lambda: [100]
    )
    rates: list[PositiveFloat] = Field(default_factory=list)
    scalings: bool = True
    widest: Annotated[float, Field(ge=1)] = 16.0
    enabled: bool = True


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

    like: Name
    use_dora: bool | None = None
    budget: Table = Field(default_factory=dict)
    factor: PositiveFloat | None = None
    follows: Name | None = None
    config: Table = Field(default_factory=dict)
    rate: PositiveFloat | None = None


class TeacherSpec(Spec):
    """The planted teacher: linear layers that must find known weights again.

    Attributes:
        noise: Standard deviation of the noise on the targets.
        rows: Training rows; none is seen twice.
    """

    noise: Annotated[float, Field(ge=0)] = 0.1
    rows: PositiveInt = 25_600


class ForgettingSpec(Spec):
    """What the model could do before: similar sentences for an encoder, any text for a decoder.

    Attributes:
        data: Files of rows.
        text: Column with the first sentence, or with the text.
        text_pair: Column with the second sentence.
        score: Column with the similarity that people see in the two.
        max_length: Longest input, in tokens.
        max_rows: Number of rows to use; None for all.
    """

    data: Files
    text: Text = "text"
    text_pair: Text = "text2"
    score: Text = "label"
    max_length: PositiveInt = 128
    max_rows: PositiveInt | None = None


class TaskSpec(Spec):
    """One task: a base model and its rows, or the planted teacher.

    Attributes:
        name: Name of the task.
        model: The base model; None for the planted teacher.
        data: The rows; None for the planted teacher.
        teacher: The planted teacher; None for a model.
        train: Keywords of ``transformers.TrainingArguments``.
        forgetting: What is measured before and after; None for nothing.
        written: The task as JSON, as it was written: paths relative, so that it identifies the
            task on every machine.
    """

    name: str
    model: ModelSpec | None
    data: DataSpec | None
    teacher: TeacherSpec | None
    train: Table
    forgetting: ForgettingSpec | None
    written: str


class AblationSpec(Spec):
    """One ablation.

    Attributes:
        name: Name of the ablation.
        description: What it asks, for people.
        methods: Names of methods, built in or declared in ``[method.NAME]``.
        budgets: The budgets.
        tasks: The tasks.
        seeds: Number of seeds (0, 1, ...), or the seeds.
        judge: The metric that comparisons are about.
        compare: Pairs of methods, ours first; declared before anything has run.
        interaction: Four methods: neither, only the first part, only the second, both.
        margin: Differences below this are called equivalent: a share of the metric, for accuracy
            absolute.
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
        return self.seeds if budget.seeds is None else _list_seeds(budget.seeds)

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
    budgets: Annotated[list[float | Table], Field(min_length=1)] = Field(
        description="list ranks, or tables such as { rank = 4, seeds = 5 }"
    )
    seeds: PositiveInt | list[NonNegativeInt] = 5
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


def load_ablation(
    path: str | Path, overrides: Sequence[str] = (), folder: Path | None = None
) -> AblationSpec:
    """Load an ablation spec.

    Args:
        path: A TOML file.
        overrides: Texts such as ``train.max_steps=20``; values are TOML, or else strings.
        folder: Where relative paths of data and models start; None for the spec's folder.

    Raises:
        SpecError: Anything is wrong with it; all faults are listed.
    """
    path = Path(path)
    content, faults = apply_overrides({"name": path.stem} | read_toml(path), overrides, {})
    document, found = check(_Document, content)
    faults += found
    source = f"ablation {str(path)!r}{' with overrides' if overrides else ''}"
    if document is None:
        raise_faults(source, faults)
        raise AssertionError("a document without faults is a document")
    adapter, found = check_adapter_table(document.adapter)
    faults += [fault.under("adapter") for fault in found]
    tuning, found = check(TuningSpec, document.tuning)
    faults += [fault.under("tuning") for fault in found]
    budgets = _check_all(BudgetPoint, _budget_tables(document.budgets), "budgets", faults)
    variants = _check_all(MethodSpec, document.method, "method", faults)
    tasks = [
        _check_task(name, table, document, folder or path.parent, faults)
        for name, table in document.tasks.items()
    ]
    faults += _comparison_faults(document)
    raise_faults(source, faults)
    assert tuning is not None
    return AblationSpec(
        name=document.name,
        description=document.description,
        methods=tuple(dict.fromkeys(document.methods)),
        budgets=tuple(budgets.values()),
        tasks=tuple(task for task in tasks if task is not None),
        seeds=_list_seeds(document.seeds),
        judge=document.judge,
        compare=tuple((ours, theirs) for ours, theirs in document.compare),
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


def _list_seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    return tuple(range(seeds)) if isinstance(seeds, int) else tuple(dict.fromkeys(seeds))


def _budget_tables(budgets: Sequence[float | Table]) -> dict[str, Table]:
    return {
        str(index): budget if isinstance(budget, dict) else {"rank": float(budget)}
        for index, budget in enumerate(budgets)
    }


def _check_all(
    model: type[SpecT], tables: Mapping[str, Table], above: str, faults: list[Fault]
) -> dict[str, SpecT]:
    specs = {}
    for name, table in tables.items():
        spec, found = check(model, table)
        faults += [fault.under(dotted(above, name)) for fault in found]
        if spec is not None:
            specs[name] = spec
    return specs


def _check_task(
    name: str, table: Table, document: _Document, folder: Path, faults: list[Fault]
) -> TaskSpec | None:
    above = dotted("tasks", name)
    unknown = [key for key in table if key not in SHARED]
    faults += [
        Fault({f"{above}.{key}": table[key]}, f"unknown key; {suggest(key, SHARED)}")
        for key in unknown
    ]
    written = {key: _merge(key, getattr(document, key), table.get(key, {})) for key in SHARED}
    is_planted = "teacher" in table
    if is_planted:
        written |= {"model": {}, "data": {}, "forgetting": {}}
    tables = resolve_paths(written, folder)
    found: list[Fault] = []
    sections: dict[str, Any] = dict.fromkeys(("model", "data", "teacher", "forgetting"))
    chosen: dict[str, type[Spec]] = (
        {"teacher": TeacherSpec} if is_planted else {"model": ModelSpec, "data": DataSpec}
    )
    if tables["forgetting"]:
        chosen["forgetting"] = ForgettingSpec
    for key, spec in chosen.items():
        sections[key], wrong = check(spec, tables[key])
        found += [fault.under(key) for fault in wrong]
    found += [fault.under("train") for fault in check_train(tables["train"])]
    found += check_columns(tables)
    faults += [fault.under(above) for fault in found]
    if found:
        return None
    return TaskSpec(
        name=name, train=tables["train"], written=json.dumps(written, sort_keys=True), **sections
    )


def _merge(key: str, shared: Table, own: Table) -> Table:
    """A task's table over the shared one; a source of data replaces the other source."""
    if key == "data" and any(source in own for source in _SOURCES):
        shared = {key: value for key, value in shared.items() if key not in _SOURCES}
    return shared | own


def _comparison_faults(document: _Document) -> Iterator[Fault]:
    for pair in document.compare:
        for method in pair:
            if method not in document.methods:
                yield Fault(
                    {"compare": pair},
                    f"compares a method that is not run; {suggest(method, document.methods)}",
                )
    for method in document.interaction or ():
        if method not in document.methods:
            yield Fault(
                {"interaction": document.interaction},
                f"needs a method that is not run; {suggest(method, document.methods)}",
            )
    for name in document.method:
        if name not in document.methods:
            yield Fault({dotted("method", name): document.method[name]}, "is declared and not run")
