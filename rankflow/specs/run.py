"""The run spec: everything that ``rankflow train`` needs, in one TOML file.

``[model]``, ``[data]`` and ``[budget]`` are RankFlow's own tables; ``[adapter]`` is passed to
``peft.LoraConfig`` and ``[train]`` to ``transformers.TrainingArguments``. Every table is checked,
and every fault of the file reported, before a model or a data set is touched.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PositiveInt

from rankflow.specs.budget import TARGETS, BudgetSpec, is_path, read_budget
from rankflow.specs.external import check_adapter, check_train
from rankflow.specs.overrides import apply_overrides
from rankflow.specs.reading import (
    ABSENT,
    Fault,
    Seed,
    Spec,
    Table,
    check,
    check_keys,
    raise_faults,
    read_toml,
    unknown_key,
)

Task = Literal["sequence-classification", "token-classification", "causal-lm", "seq2seq-lm"]
Pooling = Literal["mean", "cls", "model"]
Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["eager", "sdpa", "flash_attention_2"]
LossOn = Literal["assistant", "all"]

BUILT_IN_MODEL: Final = "minilm"
BUILT_IN_DATA: Final = "docstrings"
FILE_TYPES: Final = (".jsonl", ".json", ".csv", ".parquet")

_COLUMNS: Final[Mapping[str, frozenset[str]]] = {
    "sequence-classification": frozenset({"text_pair", "label"}),
    "token-classification": frozenset({"label"}),
    "causal-lm": frozenset({"target", "messages"}),
    "seq2seq-lm": frozenset({"target"}),
}
_NEEDS_TARGET: Final = "seq2seq-lm"  # and causal-lm may have one
_DOCSTRING_TASKS: Final = ("sequence-classification", "causal-lm")
_FILE_KEYS: Final = ("train", "validation", "test")
_ALTERNATIVES: Final[Mapping[str, Sequence[str]]] = {"budget": TARGETS, "data": ("name", "train")}


def _is_model(name: str) -> str:
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ValueError(f"no such folder; must be '{BUILT_IN_MODEL}', a folder, or a hub id")
    return name


def _as_files(value: object) -> object:
    items = value if isinstance(value, list | tuple) else [value]
    files = tuple(Path(item) for item in items if isinstance(item, str | Path))
    if not files or len(files) < len(items):
        raise ValueError("must be a file or a list of files")
    return files


def _are_data(files: tuple[Path, ...]) -> tuple[Path, ...]:
    for file in files:
        if file.suffix not in FILE_TYPES:
            raise ValueError(f"{file} must end in one of {', '.join(FILE_TYPES)}")
        if not file.is_file():
            raise ValueError(f"no such file: {file}; name one that exists")
    return files


def _as_template(value: object) -> object:
    if not isinstance(value, str | Path):
        raise ValueError("must be a file with a chat template (Jinja)")
    if not Path(value).is_file():
        raise ValueError(f"no such file: {value}; name a file with a chat template")
    try:
        Path(value).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{value} is not UTF-8: {error.reason}; save it as UTF-8") from None
    return Path(value)


Text = Annotated[str, Field(min_length=1)]
Files = Annotated[tuple[Path, ...], BeforeValidator(_as_files), AfterValidator(_are_data)]


class ModelSpec(Spec):
    """The base model and what it learns.

    Attributes:
        name: ``minilm`` (built in), a folder, or a hub id.
        task: What the model learns.
        pooling: How a sequence classifier turns token states into one vector; ``model`` keeps the
            architecture's own head.
        dtype: Type of the base weights.
        revision: Commit, tag or branch of a hub id.
        attention: Implementation of attention; None for the one that transformers chooses.
        dropout: Every dropout probability of the model's configuration; None for its own. 0 makes a
            job of several processes compute what one process does.
        chat_template: File with the template that turns messages into text, in place of the
            tokenizer's own; it is saved with the adapter.
    """

    name: Annotated[Text, AfterValidator(_is_model)] = Field(
        description=f"set it to '{BUILT_IN_MODEL}', a folder, or a hub id"
    )
    task: Task = Field(description=f"set it to one of {', '.join(_COLUMNS)}")
    pooling: Pooling = "model"
    dtype: Dtype = "float32"
    revision: Text | None = None
    attention: Attention | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    chat_template: Annotated[Path, BeforeValidator(_as_template)] | None = None

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        if self.pooling != "model" and self.task != "sequence-classification":
            yield Fault(
                {"pooling": self.pooling, "task": self.task},
                "only sequence-classification pools; remove pooling",
            )
        is_local = self.name == BUILT_IN_MODEL or Path(self.name).is_dir()
        if self.revision is not None and is_local:
            yield Fault(
                {"revision": self.revision, "name": self.name},
                "only a hub id has revisions; remove it",
            )


class DataSpec(Spec):
    """The rows to learn from.

    Attributes:
        name: ``docstrings`` (built in), or a hub id.
        config: Configuration of a hub id.
        train: Files with the training rows (jsonl, json, csv, parquet).
        validation: Files with the rows to evaluate on.
        test: Files with the rows for the final metrics.
        text: Column with the input.
        text_pair: Column with the second input of a sequence classifier.
        label: Column with the class, or with the list of classes of the words.
        target: Column with the output of a sequence-to-sequence model, or with the answer of a
            causal one: then ``text`` or ``messages`` is a prompt, and loss and metrics count the
            answer alone. None for a causal model that learns all of ``text``.
        messages: Column with conversations in place of ``text``: lists of messages, each with
            ``role`` and ``content``, which the model's chat template turns into text. A ``target``
            is then a list of messages too.
        loss_on: What of ``messages``, or of their ``target``, is learned: the turns of the
            assistant, or all.
        validation_fraction: Share of the training rows held out where there is no validation
            split; 0 for none.
        max_length: Longest input, in tokens; of a prompt and its answer together. A conversation
            loses what comes behind.
        max_train_rows: Number of training rows to use; None for all.
        max_eval_rows: Number of rows to evaluate on; None for all.
    """

    name: Text | None = None
    config: Text | None = None
    train: Files | None = None
    validation: Files | None = None
    test: Files | None = None
    text: Text = "text"
    text_pair: Text | None = None
    label: Text = "label"
    target: Text | None = None
    messages: Text | None = None
    loss_on: LossOn = "assistant"
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    max_length: PositiveInt = 128
    max_train_rows: PositiveInt | None = None
    max_eval_rows: PositiveInt | None = None

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        if self.name is None and self.train is None:
            yield Fault({"name": ABSENT, "train": ABSENT}, "no data; set one of these")
        if self.name is not None:
            for key in _FILE_KEYS:
                if getattr(self, key) is not None:
                    yield Fault(
                        {"name": self.name, key: getattr(self, key)},
                        "rows come by name or from files; keep one of these",
                    )
        if self.messages is not None and "text" in self.model_fields_set:
            yield Fault(
                {"text": self.text, "messages": self.messages},
                "a row is a text or a conversation; keep one of these",
            )
        if self.messages is None and "loss_on" in self.model_fields_set:
            yield Fault({"loss_on": self.loss_on}, "only messages have turns; set messages too")
        if self.config is not None and self.name in (None, BUILT_IN_DATA):
            yield Fault({"config": self.config}, "only a hub id has configurations; remove it")
        for key in ("validation", "test"):
            again = [file for file in getattr(self, key) or () if file in (self.train or ())]
            if again:
                yield Fault(
                    {f"{key}": again, "train": self.train},
                    "what a model was trained on does not judge it; name files with other rows, or "
                    f"leave {key} out",
                )
        if self.train is not None and len(set(self.train)) < len(self.train):
            yield Fault({"train": self.train}, "names a file twice; name each once")
        if self.validation is not None and "validation_fraction" in self.model_fields_set:
            yield Fault(
                {"validation_fraction": self.validation_fraction, "validation": self.validation},
                "nothing is held out where there are validation files; keep one of these",
            )


class RunSpec(Spec):
    """One training run.

    Attributes:
        name: Name of the run.
        model: The base model.
        data: The rows.
        adapter: Keywords of ``peft.LoraConfig``, all but ``task_type``.
        budget: The parameter budget.
        train: Keywords of ``transformers.TrainingArguments``, ``output_dir`` and ``seed`` included.
        seed: Seed of everything, also of the budget unless that has its own.
    """

    name: str
    model: ModelSpec
    data: DataSpec
    adapter: Table
    budget: BudgetSpec
    train: Table
    seed: int


class _Document(Spec):
    """The top of a run file; its tables are not looked into yet."""

    name: Annotated[str, Field(pattern=r"^\w[^/\\]*$")]
    seed: Seed = 0
    model: Table = Field(description="add [model] with name and task")
    data: Table = Field(description="add [data] with name or train")
    adapter: Table = Field(default_factory=dict)
    budget: Table = Field(description="add [budget] with preset or rank")
    train: Table = Field(default_factory=dict)


def load_run(path: str | Path, overrides: Sequence[str] = ()) -> RunSpec:
    """Load a run spec.

    Relative paths in ``[model]``, ``[data]`` and ``budget.preset`` start at the run file's folder,
    those in ``[train]`` at the working directory.

    Args:
        path: A TOML file.
        overrides: Texts such as ``budget.rank=2``; values are TOML, or else strings. A target of
            the budget replaces the other target, a source of the data the other source.

    Raises:
        SpecError: Anything is wrong with it; all faults are listed.
    """
    path = Path(path)
    written = {"name": path.stem} | read_toml(path)
    content, faults = apply_overrides(written, overrides, _ALTERNATIVES)
    document, document_faults = check(_Document, content)
    tables = {key: table for key, table in content.items() if isinstance(table, dict)}
    tables = {"adapter": {}, "train": {}} | tables
    sections, section_faults = _check_tables(resolve_paths(tables, path.parent))
    source = f"run {str(path)!r} with overrides" if overrides else f"run {str(path)!r}"
    raise_faults(source, [*faults, *document_faults, *section_faults, *check_columns(tables)])
    assert document is not None
    return _assemble(document, sections)


def resolve_paths(tables: Mapping[str, Table], folder: Path) -> dict[str, Table]:
    """Let the relative paths of a spec's tables start at a folder."""

    def beside(value: Any) -> Any:
        if isinstance(value, list):
            return [beside(item) for item in value]
        return str(folder / os.path.expanduser(value)) if isinstance(value, str) else value

    resolved = {key: dict(table) for key, table in tables.items()}
    for key, value in tables.get("data", {}).items():
        if key in _FILE_KEYS:
            resolved["data"][key] = beside(value)
    if "data" in tables.get("forgetting", {}):
        resolved["forgetting"]["data"] = beside(tables["forgetting"]["data"])
    model = tables.get("model", {}).get("name")
    is_local = isinstance(model, str) and model not in ("", BUILT_IN_MODEL)
    if is_local and Path(beside(model)).is_dir():
        resolved["model"]["name"] = beside(model)
    template = tables.get("model", {}).get("chat_template")
    if isinstance(template, str):
        resolved["model"]["chat_template"] = beside(template)
    preset = tables.get("budget", {}).get("preset")
    if isinstance(preset, str) and is_path(preset):
        resolved["budget"]["preset"] = beside(preset)
    return resolved


def _check_tables(tables: Mapping[str, Table]) -> tuple[dict[str, Any], list[Fault]]:
    checks: dict[str, Callable[[Table], tuple[Any, list[Fault]]]] = {
        "model": partial(check, ModelSpec),
        "data": partial(check, DataSpec),
        "adapter": check_adapter_table,
        "budget": _check_budget,
        "train": lambda table: (table, check_train(table)),
    }
    sections, faults = {}, []
    for key, check_table in checks.items():
        if key in tables:
            sections[key], found = check_table(tables[key])
            faults += [fault.under(key) for fault in found]
    return sections, faults


def check_adapter_table(table: Table) -> tuple[Table, list[Fault]]:
    """Complete an ``[adapter]`` table by its defaults, and return its faults."""
    keywords = {"target_modules": "all-linear"} | table
    return keywords, check_adapter(keywords)


def _check_budget(table: Table) -> tuple[BudgetSpec | None, list[Fault]]:
    known = ["preset", *BudgetSpec.model_fields]
    faults = [unknown_key(key, value, known) for key, value in table.items() if key not in known]
    keys = {key: value for key, value in table.items() if key in BudgetSpec.model_fields}
    match table.get("preset"):
        case None:
            spec, found = check(BudgetSpec, keys)
        case str(preset):
            spec, found = read_budget(preset, keys)
        case other:
            spec, found = None, check_keys(BudgetSpec, keys)
            faults.append(Fault({"preset": other}, "must be a preset's name or a path"))
    return spec, faults + found


def check_columns(tables: Mapping[str, Table]) -> Iterator[Fault]:
    """Faults between the task and the data, told from what was written, sound or not."""
    task = tables.get("model", {}).get("task")
    data = tables.get("data", {})
    if not isinstance(task, str) or task not in _COLUMNS:
        return
    model = {"model.task": task}
    for key in ("text_pair", "label", "target", "messages"):
        if key in data and key not in _COLUMNS[task]:
            yield Fault(
                {f"data.{key}": data[key]} | model, f"{task} reads no such column; remove it"
            )
    if task == _NEEDS_TARGET and "data" in tables and "target" not in data:
        yield Fault({"data.target": ABSENT} | model, "missing; set it to the column of the outputs")
    yield from _same_columns(task, data)
    if data.get("name") == BUILT_IN_DATA and task not in _DOCSTRING_TASKS:
        yield Fault(
            {"data.name": BUILT_IN_DATA} | model,
            f"it has texts and classes only, for {' or '.join(_DOCSTRING_TASKS)}",
        )
    elif data.get("name") == BUILT_IN_DATA and task == "causal-lm":
        for key, what in (("target", "answers"), ("messages", "conversations")):
            if key in data:
                yield Fault(
                    {"data.name": BUILT_IN_DATA, f"data.{key}": data[key]},
                    f"it has no {what}; remove {key}, or name files",
                )
    smoothing = tables.get("train", {}).get("label_smoothing_factor", 0)
    pooling = tables["model"].get("pooling", "model")
    if smoothing and pooling != "model":
        yield Fault(
            {"train.label_smoothing_factor": smoothing, "model.pooling": pooling},
            "a classifier that pools has a loss without smoothing; set pooling = 'model', or "
            "remove label_smoothing_factor",
        )
    template = tables["model"].get("chat_template")
    if template is not None and "messages" not in data:
        yield Fault(
            {"model.chat_template": template, "data.messages": ABSENT},
            "the template is for messages; set data.messages, or remove it",
        )


def _same_columns(task: str, data: Table) -> Iterator[Fault]:
    """Faults of a column that is read twice; the defaults count too."""
    keys = [
        "messages" if "messages" in data else "text",
        *(k for k in _COLUMNS[task] if k != "messages"),
    ]
    columns = {key: data.get(key, DataSpec.model_fields[key].default) for key in keys}
    for first, second in combinations(columns, 2):
        if columns[first] is not None and columns[first] == columns[second]:
            yield Fault(
                {f"data.{key}": columns[key] for key in (first, second)},
                "one column cannot be both; name two columns",
            )


def _assemble(document: _Document, sections: Mapping[str, Any]) -> RunSpec:
    budget: BudgetSpec = sections["budget"]
    if "seed" not in budget.model_fields_set:
        budget = budget.model_copy(update={"seed": document.seed})
    return RunSpec(
        name=document.name,
        seed=document.seed,
        model=sections["model"],
        data=sections["data"],
        adapter=sections["adapter"],
        budget=budget,
        train={"output_dir": f"runs/{document.name}", "seed": document.seed} | sections["train"],
    )
