"""PEFT's own tests, on adapters that RankFlow has steered.

TODO figures
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
