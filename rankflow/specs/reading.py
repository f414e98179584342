"""Read TOML into frozen models and report every fault of it at once.

Pydantic checks the rules between keys only when every single key is sound. So a spec declares such
rules as ``contradictions``, and `check` validates a second time without the faulty keys, keeping
the contradictions in which no faulty key takes part. The price is a second pass over a small
table, and only where there is a fault to report.
"""

import difflib
import json
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final, Self, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from rankflow.errors import SpecError

Table = dict[str, Any]
"""A TOML table as it was read."""

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""What every library that draws at random takes."""

ABSENT: Final = object()
"""Stands for the value of a key that was not given."""

_CONTRADICTION: Final = "contradiction"
_LONGEST_VALUE: Final = 200  # characters; a path stays whole, a long list does not


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong with a spec.

    Attributes:
        received: The values at fault by dotted key; ``ABSENT`` where a key was not given.
        remedy: What must hold, and what to do.
    """

    received: Mapping[str, Any]
    remedy: str

    def under(self, table: str) -> "Fault":
        """The same fault, its keys seen from the table above: ``rank`` becomes ``budget.rank``."""
        return replace(self, received={f"{table}.{k}": v for k, v in self.received.items()})

    def __str__(self) -> str:
        values = (k if v is ABSENT else f"{k} = {_show(v)}" for k, v in self.received.items())
        return f"  {', '.join(values)}\n    {self.remedy}"


class Spec(BaseModel):
    """Base of all specs: frozen, strictly typed, without unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        yield from ()

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        faults = tuple(self.contradictions())
        if faults:
            context = {"text": "\n".join(map(str, faults)), "faults": faults}
            raise PydanticCustomError(_CONTRADICTION, "{text}", context)
        return self


SpecT = TypeVar("SpecT", bound=Spec)


def check(model: type[SpecT], values: Mapping[str, Any]) -> tuple[SpecT | None, list[Fault]]:
    """Validate a whole table against a spec.

    Returns:
        The spec, or None where it has faults; and all its faults.
    """
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        faults = _key_faults(model, error) + _contradictions(error)
    faulty = {key.split(".")[0] for fault in faults for key in fault.received}
    rest = {key: value for key, value in values.items() if key not in faulty}
    try:
        model.model_validate(rest)
    except ValidationError as error:
        faults += [f for f in _contradictions(error) if faulty.isdisjoint(f.received)]
    return None, faults


def check_keys(model: type[Spec], values: Mapping[str, Any]) -> list[Fault]:
    """Validate each key of an incomplete table, without the rules between keys."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return _key_faults(model, error)
    return []


def check_value(key: str, annotation: Any, value: object) -> list[Fault]:
    """Validate one value against a type annotation; a union gives one fault, not one per member.

    >>> print(*check_value("alpha", int | None, "8"))
      alpha = "8"
        must be a valid integer
    """
    try:
        TypeAdapter(annotation).validate_python(value, strict=True)
    except ValidationError as error:
        remedies = dict.fromkeys(_remedy(details) for details in error.errors())
        return [Fault({key: value}, ", or ".join(remedies))]
    return []


def unknown_key(key: str, value: object, known: Iterable[str]) -> Fault:
    """The fault of a key that a table does not have.

    >>> print(unknown_key("rnak", 8, ["rank", "params"]))
      rnak = 8
        unknown key; did you mean 'rank'?
    """
    return Fault({key: value}, f"unknown key; {suggest(key, known)}")


def suggest(word: str, known: Iterable[str]) -> str:
    """Point from a wrong word to the closest known one."""
    closest = difflib.get_close_matches(word, list(known), n=1, cutoff=0.0)[0]
    return f"did you mean '{closest}'?"


def dotted(*parts: str) -> str:
    """A dotted TOML key, its parts quoted where TOML asks for it.

    >>> dotted("bounds", "layers.0", "min_rank")
    'bounds."layers.0".min_rank'
    """
    bare = re.compile(r"[A-Za-z0-9_-]+")
    return ".".join(part if bare.fullmatch(part) else f'"{part}"' for part in parts)


def read_toml(path: Path) -> Table:
    """Parse a TOML file.

    Raises:
        SpecError: The file cannot be read, or is not TOML; the message names the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise SpecError(
            f"{path} is not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from error
    except OSError as error:
        raise SpecError(
            f"{path} cannot be read: {error.strerror}; name a TOML file that exists"
        ) from error


def raise_faults(source: str, faults: list[Fault]) -> None:
    """Raise one error that lists the faults, if there are any.

    Raises:
        SpecError: There is at least one fault.
    """
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise SpecError("\n".join([f"{source}: {count}", *map(str, faults)]))


def _key_faults(model: type[Spec], error: ValidationError) -> list[Fault]:
    return [_key_fault(model, d) for d in error.errors() if d["type"] != _CONTRADICTION]


def _contradictions(error: ValidationError) -> list[Fault]:
    return [
        fault
        for details in error.errors()
        if details["type"] == _CONTRADICTION
        for fault in details["ctx"]["faults"]
    ]


def _key_fault(model: type[Spec], details: ErrorDetails) -> Fault:
    location = [str(part) for part in details["loc"]]
    key = dotted(*(part for part in location if part != "[key]"))
    match details["type"]:
        case "missing":
            advice = model.model_fields[location[0]].description or "set it"
            return Fault({key: ABSENT}, f"missing; {advice}")
        case "extra_forbidden":
            remedy = f"unknown key; {suggest(location[-1], _known_keys(model, location))}"
            return Fault({key: details["input"]}, remedy)
        case _:
            return Fault({key: details["input"]}, _remedy(details))


def _known_keys(model: type[Spec], location: list[str]) -> Iterable[str]:
    """Keys of the table around ``location``: the spec itself, or a spec in one of its fields."""
    if len(location) == 1:
        return model.model_fields
    members = get_args(model.model_fields[location[0]].annotation)
    inner = next(m for m in members if isinstance(m, type) and issubclass(m, Spec))
    return inner.model_fields


def _remedy(details: ErrorDetails) -> str:
    demand = re.sub(r"^\w+ should", "must", details["msg"])
    demand = demand.removeprefix("Value error, ").replace("valid dictionary", "table")
    if details["type"] != "literal_error":
        return demand
    choices = details["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    return f"{demand}; {suggest(str(details['input']), choices)}"


def _show(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 3] + "..."
