"""Overrides of a TOML document: ``budget.rank=2`` on a command line."""

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rankflow.specs.reading import Fault, Table


def apply_overrides(
    document: Mapping[str, Any],
    overrides: Iterable[str],
    alternatives: Mapping[str, Sequence[str]],
) -> tuple[Table, list[Fault]]:
    """Write dotted overrides into a document.

    Keys and values are TOML; a value that is not is a string, so that names and paths need no
    quotes. Dotted keys are taken apart, whole tables are replaced.

    Args:
        document: What the file said.
        overrides: Texts of the form ``table.key=value``; the last one wins.
        alternatives: By table, the keys of which only one may stand: setting one removes the rest.

    Returns:
        The new document, and the overrides that could not be read.

    >>> apply_overrides({"train": {"max_steps": 9}}, ["train.max_steps=2", "name=short"], {})
    ({'train': {'max_steps': 2}, 'name': 'short'}, [])
    """
    changed, faults = dict(document), []
    for override in overrides:
        key, equals, value = override.partition("=")
        path = _parse_key(key)
        if not equals or not path:
            faults.append(Fault({"override": override}, "must read as in budget.rank=2"))
            continue
        changed = _assign(
            _drop_alternatives(changed, path, alternatives), path, _parse_value(value)
        )
    return changed, faults


def _parse_key(key: str) -> list[str]:
    """Parts of a dotted TOML key; none where it is not one."""
    try:
        node: Any = tomllib.loads(f"{key} = 0")
    except tomllib.TOMLDecodeError:
        return []
    path = []
    while isinstance(node, dict):
        part, node = next(iter(node.items()))
        path.append(part)
    return path


def _parse_value(value: str) -> Any:
    try:
        return tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return value.strip()


def _drop_alternatives(
    document: Table, path: list[str], alternatives: Mapping[str, Sequence[str]]
) -> Table:
    table = document.get(path[0])
    keys = alternatives.get(path[0], ())
    if not isinstance(table, dict) or len(path) < 2 or path[1] not in keys:
        return document
    return document | {path[0]: {k: v for k, v in table.items() if k not in keys}}


def _assign(table: Table, path: list[str], value: Any) -> Table:
    head, *rest = path
    if not rest:
        return table | {head: value}
    below = table.get(head)
    return table | {head: _assign(below if isinstance(below, dict) else {}, rest, value)}
