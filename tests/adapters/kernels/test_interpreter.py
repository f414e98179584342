import os
import pathlib
import re
import subprocess
import sys

import pytest


def test_the_kernels_are_right_in_tritons_interpreter():
    """Triton reads its switch when it is imported, which this process may have done."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "interpreter"]
    here = pathlib.Path(__file__)
    run = subprocess.run(
        [*command, str(here.parent)],
        cwd=here.parents[3],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed is not None
    assert int(passed[1]) >= 100, run.stdout
    assert "skipped" not in run.stdout
