"""Runs rows of PEFT's test suite, with RankFlow on the adapters that they make or without."""

import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftConfig
from steering import Scene, Steered, Steering

_OPTIONS = (
    *("-q", "--tb=short", "--disable-warnings", "-W", "default", "-p", "no:cacheprovider"),
    *("-p", "no:unraisableexception"),  # it would collect all garbage several times
)


@dataclass(frozen=True, slots=True)
class Row:
    """One test with one set of parameters.

    Attributes:
        name: File, class, function and parameters, as pytest names them.
        outcome: ``passed``, ``failed`` or ``skipped``.
        error: The end of what pytest says of a failure.
        steered: What RankFlow did to the adapters that the test made.
    """

    name: str
    outcome: str
    error: str
    steered: tuple[Steered, ...]


def run_rows(
    package: Path,
    files: Sequence[str],
    scene: Scene | None,
    names: Collection[str] | None = None,
) -> list[Row]:
    """Run the rows that may concern LoRA.

    Args:
        package: A folder of tests; they are imported afresh.
        files: Names of files in it.
        scene: What RankFlow's events do to each adapter; None for stock PEFT.
        names: The rows to run; None for all.
    """
    imported = [m for m in sys.modules if m.partition(".")[0] == package.name]
    for module in imported:
        del sys.modules[module]
    recorder = _Recorder(Steering(scene), names)
    (package / "none.ini").touch()
    options = ["-c", str(package / "none.ini"), "--rootdir", str(package), *_OPTIONS]
    with recorder.steering.installed():
        pytest.main([*options, *(str(package / file) for file in files)], plugins=[recorder])
    return recorder.rows


class _Recorder:
    """pytest plugin that picks the rows and records what came of them."""

    def __init__(self, steering: Steering, names: Collection[str] | None) -> None:
        self.steering = steering
        self._names = names
        self.rows: list[Row] = []

    @pytest.hookimpl
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [
            item
            for item in items
            if _may_concern_lora(item) and (self._names is None or item.nodeid in self._names)
        ]

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._outcome, self._error = "passed", ""
        self.steering.begin_test()
        result = yield
        done = tuple(self.steering.done)
        self.rows.append(Row(item.nodeid, self._outcome, self._error, done))
        return result

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.passed and self._outcome != "failed":
            self._outcome, self._error = report.outcome, report.longreprtext[-1500:]


def _may_concern_lora(item: pytest.Item) -> bool:
    """Whether a row has no config among its parameters, or one of LoRA's."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    kinds = [kind for value in parameters if (kind := _config_class(value)) is not None]
    return not kinds or LoraConfig in kinds


def _config_class(value: Any) -> type[PeftConfig] | None:
    kind = value if isinstance(value, type) else type(value)
    return kind if issubclass(kind, PeftConfig) else None
