"""The tasks of an ablation spec: what all share, and what ``[tasks.NAME...]`` says of one.

A fault in a shared table is reported where it was written, and once, however many tasks share it.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, PositiveInt

from rankflow.specs.external import check_train
from rankflow.specs.reading import ABSENT, Fault, Spec, Table, check, dotted, unknown_key
from rankflow.specs.run import DataSpec, Files, ModelSpec, Text, check_columns, resolve_paths

SHARED: Final = ("model", "data", "train", "forgetting", "teacher")
SOURCES: Final = ("name", "train")
_OF_MODELS: Final = ("model", "data", "forgetting")

_METRICS: Final[Mapping[str, tuple[str, ...]]] = {
    "sequence-classification": ("nll", "accuracy"),
    "token-classification": ("nll", "accuracy"),
    "causal-lm": ("nll", "perplexity"),
}
_TRAIN_OWNED: Final = {
    "learning_rate": "is tuned; set rates in [tuning], or rate in [method.NAME]",
    "seed": "is each cell's own; set seeds at the top of the file",
    "output_dir": "is each cell's own; remove it, and name a folder with --out",
    "eval_strategy": "a cell is judged once, at its end; remove it",
    "load_best_model_at_end": "a cell is judged as it ended; remove it",
}


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

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured, any of which can be judged."""
        if self.model is None:
            return ("excess",)
        has_targets = self.data is not None and self.data.target is not None
        return _METRICS[self.model.task] + (("accuracy",) if has_targets else ())


def check_tasks(
    content: Mapping[str, Any], folder: Path
) -> tuple[tuple[TaskSpec, ...], list[Fault]]:
    """Validate all tasks of a document, whatever else is wrong with it.

    Args:
        content: The whole document.
        folder: Where relative paths start.

    Returns:
        The sound tasks, and the faults of the others.
    """
    shared = {key: _as_table(content.get(key)) for key in SHARED}
    specs, faults = [], []
    for name, own in _as_table(content.get("tasks")).items():
        if isinstance(own, dict):
            spec, found = _check_task(name, own, shared, folder)
            specs.append(spec)
            faults += found
    return tuple(spec for spec in specs if spec is not None), _once(faults)


def _check_task(
    name: str, own: Table, shared: Mapping[str, Table], folder: Path
) -> tuple[TaskSpec | None, list[Fault]]:
    above = dotted("tasks", name)
    odd = [unknown_key(key, value, SHARED) for key, value in own.items() if key not in SHARED]
    odd += [
        Fault({key: own[key]}, "must be a table")
        for key in SHARED
        if not isinstance(own.get(key, {}), dict)
    ]
    is_planted = "teacher" in own
    if is_planted:
        odd += [
            Fault({key: own[key]}, "the planted teacher has none; remove it, or teacher")
            for key in _OF_MODELS
            if key in own
        ]
    faults = [fault.under(above) for fault in odd]
    tables = {key: _as_table(own.get(key)) for key in SHARED}
    written = {key: _merge(key, shared[key], tables[key]) for key in SHARED}
    if is_planted:
        written |= {key: {} for key in _OF_MODELS}
    sections, found = _check_sections(resolve_paths(written, folder), is_planted)
    faults += [_locate(fault, above, tables, shared) for fault in found]
    if faults:
        return None, faults
    return TaskSpec(name=name, written=json.dumps(written, sort_keys=True), **sections), []


def _check_sections(
    tables: Mapping[str, Table], is_planted: bool
) -> tuple[dict[str, Any], list[Fault]]:
    sections: dict[str, Any] = dict.fromkeys(("model", "data", "teacher", "forgetting"))
    chosen: dict[str, type[Spec]] = (
        {"teacher": TeacherSpec} if is_planted else {"model": ModelSpec, "data": DataSpec}
    )
    if tables["forgetting"]:
        chosen["forgetting"] = ForgettingSpec
    faults = []
    for key, spec in chosen.items():
        sections[key], found = check(spec, tables[key])
        faults += [fault.under(key) for fault in found]
    sections["train"] = tables["train"]
    faults += [fault.under("train") for fault in _check_train(tables["train"])]
    if not is_planted:
        faults += check_columns(tables)
    model = sections["model"]
    if model is not None and model.task not in _METRICS:
        faults.append(
            Fault({"model.task": model.task}, f"an ablation judges {', '.join(_METRICS)}")
        )
    return sections, faults


def _check_train(table: Table) -> Iterator[Fault]:
    for key in _TRAIN_OWNED:
        if key in table:
            yield Fault({key: table[key]}, _TRAIN_OWNED[key])
    yield from check_train({k: value for k, value in table.items() if k not in _TRAIN_OWNED})


def _merge(key: str, shared: Table, own: Table) -> Table:
    """A task's table over the shared one; a source of data replaces the other source."""
    if key == "data" and any(source in own for source in SOURCES):
        shared = {key: value for key, value in shared.items() if key not in SOURCES}
    return shared | own


def _locate(
    fault: Fault, above: str, own: Mapping[str, Table], shared: Mapping[str, Table]
) -> Fault:
    """Leave a fault at the top where all that is at fault was written there."""

    def is_shared(key: str) -> bool:
        section, _, rest = key.partition(".")
        head = rest.split(".")[0]
        return head in shared[section] and head not in own[section]

    given = [key for key, value in fault.received.items() if value is not ABSENT]
    return fault if given and all(map(is_shared, given)) else fault.under(above)


def _once(faults: list[Fault]) -> list[Fault]:
    return list({str(fault): fault for fault in faults}.values())


def _as_table(value: object) -> Table:
    return value if isinstance(value, dict) else {}
