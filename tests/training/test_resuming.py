import json
import os
import signal
from pathlib import Path

import pytest
from rich.console import Console
from transformers import TrainerCallback

from rankflow.errors import CheckpointError
from rankflow.specs.run import load_run
from rankflow.training import run as run_module
from rankflow.training.interrupts import StopSignals
from rankflow.training.run import train

RUN = """
name = "trial"
[model]
name = "bert"
task = "sequence-classification"
pooling = "mean"
[data]
train = "rows.jsonl"
max_length = 16
[budget]
rank = 2
start = 3
schedule = "linear"
warmup = 2
cooldown = 2
every = 2
[train]
max_steps = 8
use_cpu = true
save_steps = 3
report_to = "none"
output_dir = "run"
"""


class Alarm(TrainerCallback):
    """Sends this process a signal in the middle of a step, as often as it is told to."""

    def __init__(self, number, step, times=1):
        self.number, self.step, self.times = number, step, times

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.fixture
def desk(tmp_path, monkeypatch, bert_folder, write_rows, sentiment_rows):
    monkeypatch.chdir(tmp_path)
    write_rows("rows.jsonl", sentiment_rows)
    Path("run.toml").write_text(RUN)
    return tmp_path


@pytest.fixture
def go(desk, capsys):
    """Train in the folder ``run``, or in another; return what was told."""

    def go(*overrides, resume=False):
        train(load_run("run.toml", overrides), console=Console(width=200), resume=resume)
        return capsys.readouterr().out

    return go


@pytest.fixture
def signalled(go, capsys, monkeypatch):
    """Train until a signal comes; return the exit code and what was told."""

    def signalled(number, step, *overrides, times=1):
        make = run_module.make_trainer

        def make_trainer(*arguments):
            trainer = make(*arguments)
            trainer.add_callback(Alarm(number, step, times))
            return trainer

        with monkeypatch.context() as patch:
            patch.setattr(run_module, "make_trainer", make_trainer)
            with pytest.raises(SystemExit) as ended:
                go(*overrides)
        return ended.value.code, capsys.readouterr().out

    return signalled


def saved(folder="run"):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def weights(folder="run"):
    return Path(folder, "adapter", "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on_from_there(
    number, code, go, signalled
):
    go("train.output_dir=whole")
    exited, told = signalled(number, 5)
    assert exited == code
    name = signal.Signals(number).name
    assert f"{name}: saved after step 5 of 8 in run; go on with the same command and --res" in told
    assert saved() == ["checkpoint-3", "checkpoint-5"]
    assert not Path("run/adapter").exists()
    assert f"resume      run{os.sep}checkpoint-5" in go(resume=True)
    assert weights() == weights("whole")
    assert Path("run/events.jsonl").read_text().count("\n") == 3


def test_a_signal_saves_also_where_nothing_else_would(signalled):
    assert signalled(signal.SIGTERM, 5, "train.save_strategy=no")[0] == 143
    assert saved() == ["checkpoint-5"]


def test_a_second_signal_ends_the_run_at_once(signalled):
    assert signalled(signal.SIGINT, 5, times=2)[0] == 130
    assert saved() == ["checkpoint-3"]


def test_a_signal_outside_of_training_ends_the_process_at_once(capsys):
    with pytest.raises(SystemExit) as ended, StopSignals(Console()):
        os.kill(os.getpid(), signal.SIGTERM)
    assert ended.value.code == 143


def test_signals_are_handled_as_before_once_a_run_is_over(go):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    go()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_a_run_that_was_never_begun_begins(go):
    assert "nothing is saved yet: the run begins" in go(resume=True)
    assert saved() == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]


def test_a_run_that_has_ended_is_told_again_and_not_run(go):
    told = go()
    before = {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")}
    again = go(resume=True)
    assert told.partition("parameters  ")[2] == again.partition("parameters  ")[2] != ""
    assert {path: path.stat().st_mtime_ns for path in Path("run").rglob("*")} == before


def test_a_run_that_was_killed_before_its_result_was_written_is_finished(go):
    go()
    expected = weights()
    Path("run/metrics.json").unlink()
    go(resume=True)
    assert weights() == expected
    assert Path("run/metrics.json").is_file()


def test_a_damaged_checkpoint_is_skipped_and_told(go, signalled):
    go("train.output_dir=whole")
    signalled(signal.SIGTERM, 5)
    file = Path("run/checkpoint-5/optimizer.pt")
    file.write_bytes(file.read_bytes()[:-1])
    told = go(resume=True)
    assert f"skipped     run{os.sep}checkpoint-5: optimizer.pt is not what was written" in told
    assert f"resume      run{os.sep}checkpoint-3" in told
    assert weights() == weights("whole")


def test_where_all_checkpoints_are_damaged_the_run_is_not_begun_by_mistake(go, signalled):
    signalled(signal.SIGTERM, 2)
    Path("run/checkpoint-2/SHA256SUMS").unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint in run is as it was written; with"):
        go(resume=True)
    assert saved() == ["checkpoint-2"]


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("budget.rank=1", "budget.rank was 2.0 and is 1.0"),
        ("train.learning_rate=1.0", "train.learning_rate was None and is 1.0"),
        ("data.max_length=8", "data.max_length was 16 and is 8"),
    ],
)
def test_a_run_is_not_resumed_under_another_spec(override, told, go, signalled):
    signalled(signal.SIGTERM, 2)
    with pytest.raises(CheckpointError, match=rf"other settings: {told}; resume with the spec"):
        go(override, resume=True)


def test_a_checkpoint_that_is_named_in_the_spec_is_gone_on_from(go, signalled):
    go("train.output_dir=whole")
    signalled(signal.SIGTERM, 5)
    go("train.resume_from_checkpoint=run/checkpoint-3", resume=False)
    assert weights() == weights("whole")


@pytest.mark.parametrize("file", ["run.json", "metrics.json"])
def test_damaged_records_of_a_run_are_told(file, go):
    go()
    Path("run", file).write_text("{")
    with pytest.raises(CheckpointError, match=rf"{file} is damaged \(.*\); re(store|move) it"):
        go(resume=True)


def test_the_result_is_read_back_as_it_was(go):
    go()
    recorded = json.loads(Path("run/metrics.json").read_text())
    assert recorded["ranks"] == run_module.read_result(Path("run")).ranks
