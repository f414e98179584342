"""What the rows say: pure, from the rows of stock PEFT and of one scene to lists of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from exclusions import Exclusion
from rows import Row
from steering import Scene


@dataclass(slots=True)
class Verdict:
    """The rows of one scene that stock PEFT passes.

    Attributes:
        scene: The scene.
        passed: Rows that pass on an adapter that shows the scene.
        failed: Rows that do not pass, and must.
        unshown: Rows that pass, but whose adapters cannot show the scene.
        untouched: Rows that pass and make no LoRA adapter, or only by PEFT's inner functions.
        excluded: Rows that do not pass and need not.
        needless: Rows that need not pass, and do.
    """

    scene: Scene
    passed: list[Row] = field(default_factory=list)
    failed: list[Row] = field(default_factory=list)
    unshown: list[Row] = field(default_factory=list)
    untouched: list[Row] = field(default_factory=list)
    excluded: list[tuple[Exclusion, Row]] = field(default_factory=list)
    needless: list[Row] = field(default_factory=list)


def judge(
    stock: Sequence[Row], steered: Sequence[Row], scene: Scene, exclusions: Sequence[Exclusion]
) -> Verdict:
    """Sort the rows that stock PEFT passes by what becomes of them on steered adapters.

    A row that is skipped there, or missing, fails.
    """
    verdict = Verdict(scene)
    by_name = {row.name: row for row in steered}
    for control in stock:
        if control.outcome != "passed":
            continue
        row = by_name.get(control.name, Row(control.name, "missing", "it did not run", ()))
        exclusion = next((e for e in exclusions if e.covers(row.name, scene)), None)
        shown = any(adapter.shows(scene) for adapter in row.steered)
        if row.outcome != "passed":
            if exclusion is not None and exclusion.error in row.error:
                verdict.excluded.append((exclusion, row))
            else:
                verdict.failed.append(row)
        elif not row.steered:
            verdict.untouched.append(row)
        elif not shown:
            verdict.unshown.append(row)
        elif exclusion is None:
            verdict.passed.append(row)
        else:
            verdict.needless.append(row)
    return verdict


def find_stale(verdicts: Sequence[Verdict], exclusions: Sequence[Exclusion]) -> list[Exclusion]:
    """Return the exclusions that no row needs."""
    used = {exclusion for verdict in verdicts for exclusion, _ in verdict.excluded}
    return [exclusion for exclusion in exclusions if exclusion not in used]
