import os
import subprocess
import sys

import pytest

from rankflow.bench.cases import CASES
from rankflow.export.formats import FORMATS
from rankflow.specs.budget import list_budgets

SLOW = ("torch", "transformers", "peft")
PROGRAM = f"""
import atexit, sys
atexit.register(lambda: print(*sorted(set({SLOW}) & set(sys.modules)), file=sys.stderr))
from rankflow.cli import app
app(prog_name="rankflow")
"""


def complete(line):
    """Return what bash would suggest at the end of a line, without a slow import."""
    words = line.split(" ")
    asked = {"_RANKFLOW_COMPLETE": "complete_bash", "COMP_WORDS": line}
    shell = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=os.environ | asked | {"COMP_CWORD": str(len(words) - 1)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stderr.strip() == ""
    return shell.stdout.split()


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("rankflow ", {"init", "train", "plan", "inspect", "export", "compress", "budgets"}),
        ("rankflow pl", {"plan"}),
        ("rankflow plan run.toml --", {"--set", "--measure", "--json", "--help"}),
        ("rankflow budgets show ", set(list_budgets())),
        ("rankflow budgets show ad", {"adalora"}),
        ("rankflow compress adapter --budget ", set(list_budgets())),
        ("rankflow init --budget hy", {"hybrid"}),
        ("rankflow init --task seq", {"sequence-classification", "seq2seq-lm"}),
        ("rankflow export run --format ", set(FORMATS)),
        ("rankflow bench --case ", {case.name for case in CASES}),
        ("rankflow ablate --executor r", {"ray"}),
    ],
)
def test_a_shell_completes_commands_options_and_values(line, expected):
    suggested = set(complete(line))
    assert expected <= suggested
    if not line.endswith((" ", "--")):
        assert suggested == expected


@pytest.mark.parametrize("line", ["rankflow train exa", "rankflow budgets show mine.to"])
def test_files_are_left_to_the_shell(line):
    assert complete(line) == []
