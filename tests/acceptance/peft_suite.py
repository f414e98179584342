"""PEFT's own tests, on adapters that RankFlow has steered.

    HF_HUB_OFFLINE=1 python tests/acceptance/peft_suite.py PEFT_SOURCES

PEFT_SOURCES holds ``setup.py`` and ``tests/`` of the installed PEFT: a checkout of its tag, or its
unpacked source distribution. The tests want ``parameterized``. Every LoRA or DoRA adapter that a
test makes is attached to a ``RankFlow`` whose events change its ranks before the test goes on, in
three scenes (``steering.py``). A row passes if it passes so and the scene came about; it must if it
passes on stock PEFT here, unless ``exclusions.py`` gives a reason. The exit code is 1 if one does
not, if an excluded row passes after all, or if an exclusion is of no use.

Figures of 2026-11-27, PEFT 0.21.2 (source distribution), torch 2.13 on a CPU, no model hub. No run
of all files with the exclusions as they stand was finished; these are of single files:

* ``test_initialization.py``, by this script: of 402 rows stock PEFT passes 368. Ranks changed in 80
  rows that pass (a site of rank 0 in 33, a magnitude off in 2); 92 are excluded, none fails. Of the
  80 and the 33, 14 and 8 were excluded then, by patterns that were too wide and are narrower now.
* ``test_custom_models.py``: of 2,829 rows stock PEFT passes 2,688.

  ==============  ======  ==========  ===========  ==========  ======
  scene           passed  not counted  no adapter  excluded    failed
  ==============  ======  ==========  ===========  ==========  ======
  uneven           1,456           0           93       1,087      41
  dead               731         685           93       1,132      46
  ==============  ======  ==========  ===========  ==========  ======

  "Not counted" passed on an adapter that cannot show the scene. Of the failures 9 in each scene are
  kinds that RankFlow refuses, 26 load what was saved by the test's own ``LoraConfig``, which states
  other ranks, 5 want a correlation that sums of rank 8 have, and the others want more movement from
  a few steps, or an adapter at a dead site. They are in ``exclusions.py`` now, as 12 excluded rows
  that passed are no longer; the script has not run since. Magnitudes turned off were only begun.
"""

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import peft
from exclusions import EXCLUSIONS, Exclusion
from huggingface_hub.constants import HF_HUB_OFFLINE
from rows import Row, run_rows
from steering import SCENES
from verdict import Verdict, find_stale, judge

FILES = (
    "test_custom_models.py",
    "test_initialization.py",
    "test_tuners_utils.py",
    "test_low_level_api.py",
    "test_other.py",
    "test_helpers.py",
    "test_lora_variants.py",
    "test_loraplus.py",
    "test_lorafa.py",
    "test_riemannian_lora.py",
    "test_trainable_tokens.py",
    "test_mapping.py",
)
"""Files whose rows make LoRA adapters of kinds that RankFlow steers, without the model hub."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the suite and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path, help="PEFT's sources, of the installed version")
    parser.add_argument("--file", action="append", help="run this file of its tests alone")
    options = parser.parse_args(arguments)
    files = options.file or FILES
    check_version(options.checkout)
    exclusions = [e for e in EXCLUSIONS if e.file in files]
    with tempfile.TemporaryDirectory() as scratch:
        package = copy_tests(options.checkout, Path(scratch))
        stock = run_rows(package, files, None)
        names = {row.name for row in stock if row.outcome == "passed"}
        verdicts = [
            judge(stock, run_rows(package, files, scene, names), scene, exclusions)
            for scene in SCENES
        ]
    stale = find_stale(verdicts, exclusions)
    print(report(stock, verdicts, stale))
    return 1 if stale or any(v.failed or v.needless or not v.passed for v in verdicts) else 0


def check_version(checkout: Path) -> None:
    """Exit if the tests are not those of the installed PEFT."""
    found = re.search(r'^VERSION = "(.*)"$', (checkout / "setup.py").read_text(), re.MULTILINE)
    version = found.group(1) if found else "an unknown version"
    if version != peft.__version__:
        sys.exit(
            f"the tests in {checkout} are of PEFT {version}, and {peft.__version__} is installed; "
            "check out its tag, or unpack its source distribution"
        )


def copy_tests(checkout: Path, scratch: Path) -> Path:
    """Copy the tests into a package, which a source distribution lacks the marks of."""
    package = scratch / "peft_tests"
    package.mkdir()
    for file in (checkout / "tests").glob("*.py"):
        shutil.copy(file, package)
    (package / "__init__.py").touch()
    if HF_HUB_OFFLINE:  # PEFT's tests would ask the hub all the same, and wait for it long
        with (package / "testing_utils.py").open("a") as file:
            file.write("\nfrom contextlib import nullcontext as hub_online_once  # noqa\n")
    return package


def report(stock: Sequence[Row], verdicts: Sequence[Verdict], stale: Sequence[Exclusion]) -> str:
    """Return the figures, and every row that must not be as it is."""
    outcomes = Counter(row.outcome for row in stock)
    lines = [
        "",
        f"PEFT {peft.__version__}: {len(stock)} rows may concern LoRA. Stock PEFT passes "
        f"{outcomes['passed']} here, skips {outcomes['skipped']} and fails {outcomes['failed']}; "
        "of those that it passes",
    ]
    for verdict in verdicts:
        lines += _figures(verdict)
    lines += ["", "excluded, by scene", *_reasons(verdicts)]
    lines += [f"STALE {e.file} {e.pattern}: no row needs this exclusion" for e in stale]
    for verdict in verdicts:
        lines += [f"NEEDLESS {verdict.scene} {row.name}: passes" for row in verdict.needless]
        lines += [f"FAILED {verdict.scene} {r.name}\n{r.error}" for r in verdict.failed]
    return "\n".join(lines)


def _figures(verdict: Verdict) -> list[str]:
    adapters = [steered for row in verdict.passed for steered in row.steered]
    moved = sum(steered.pruned > 0 for steered in adapters)
    dead = sum(0 in steered.after.values() for steered in adapters)
    return [
        "",
        f"{verdict.scene} ({SCENES[verdict.scene]})",
        f"  {len(verdict.passed):5} pass; of their {len(adapters)} adapters events pruned {moved}, "
        f"and {dead} have a site of rank 0",
        f"  {len(verdict.failed):5} fail",
        f"  {len(verdict.unshown):5} pass, and their adapters cannot show this",
        f"  {len(verdict.untouched):5} pass, and make no LoRA adapter by get_peft_model",
        f"  {len(verdict.excluded):5} are excluded",
    ]


def _reasons(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """One line for each reason, with the number of rows in every scene."""
    counts = Counter((e.reason, v.scene) for v in verdicts for e, _ in v.excluded)
    for reason in dict.fromkeys(reason for reason, _ in counts):
        numbers = "".join(f"{counts[reason, verdict.scene]:6}" for verdict in verdicts)
        yield f"{numbers}  {reason}"


if __name__ == "__main__":
    sys.exit(main())
