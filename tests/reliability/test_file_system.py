"""What the file system does to one save of a checkpoint, call by call.

``strace`` attaches to a process that is about to save, and kills it at a chosen call, or lets calls
fail from then on. After a kill the machine may lose power too: what was written to a file since it
was last flushed is lost then.
"""

import os
import random
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification, TrainingArguments, set_seed

from rankflow.checkpoint import find_checkpoint
from rankflow.durable import SUMS_FILE
from rankflow.errors import CheckpointError
from rankflow.integrations.huggingface import RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

WRITES = ("write", "writev", "pwrite64", "ftruncate", "fallocate")
CALLS = (
    *("openat", "mkdir", "rename", "renameat2", "unlink", "unlinkat", "rmdir", "fsync", "flock"),
    *WRITES,
)
SAVED, REFUSED, BROKEN = 0, 3, 1
CHANGING = ("README.md", "training_args.bin")  # in a file of its own by time or path

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")


@dataclass(frozen=True)
class Call:
    """One call of a save that can change a disk.

    Attributes:
        name: The system call.
        number: How many of that name came up to it.
    """

    name: str
    number: int


@dataclass(frozen=True)
class Desk:
    """A run that stands after its third step, with a checkpoint of its second.

    Attributes:
        trainer: It.
        folder: Its output folder, as it was then.
    """

    trainer: RankFlowTrainer
    folder: Path

    def save(self, folder: Path) -> None:
        """Save the third step into a copy of the folder."""
        self.trainer.args.output_dir = str(folder)
        set_seed(0)  # the state of the generators is saved too
        self.trainer._save_checkpoint(self.trainer.model, None)


@pytest.fixture(scope="module")
def desk(desk, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving") / "run"
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_pretrained(desk / "bert")
    config = LoraConfig(r=2, target_modules="all-linear", task_type="SEQ_CLS", use_dora=True)
    rows = [{"input_ids": torch.tensor([2, word, 3]), "labels": word % 2} for word in range(4, 8)]
    trainer = RankFlowTrainer(
        model=get_peft_model(base, config),
        args=TrainingArguments(
            output_dir=str(folder), max_steps=3, save_steps=2, report_to="none", use_cpu=True
        ),
        train_dataset=rows * 4,
        budget=BudgetSpec(rank=2, start=3, schedule="linear", every=1, warmup=1, cooldown=1),
    )
    trainer.train()
    shutil.rmtree(folder / "checkpoint-3")
    return Desk(trainer, folder)


@dataclass(frozen=True)
class Traced:
    """What became of a process that saved under strace: its exit code, and its calls."""

    code: int
    lines: list[str]


@pytest.fixture
def traced(forked, tmp_path):
    """Run a function in a process of its own, under strace."""

    def trace(work: Callable[[], object], *options: str) -> Traced:
        log = tmp_path / "strace"
        ready, go = os.pipe()
        child = forked(lambda: (os.read(ready, 1), work()))
        command = ["strace", "-f", "-q", "-y", "-s", "0", "-o", str(log), "-p", str(child.pid)]
        tracer = subprocess.Popen([*command, "-e", f"trace={','.join(CALLS)}", *options])
        status = Path(f"/proc/{child.pid}/status")
        child.wait_until(lambda: "TracerPid:\t0\n" not in status.read_text())
        os.write(go, b"x")
        code = child.wait()
        tracer.wait()
        os.close(go)
        os.close(ready)
        return Traced(code, log.read_text().splitlines())

    return trace


@pytest.fixture
def copy(desk, tmp_path):
    """Return a new copy of the run's folder."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(desk.folder, tmp_path / name))

    return copy


@pytest.fixture
def calls(desk, copy, traced):
    """Every call of one save that nothing happens to."""
    whole(desk)  # what a save imports is imported from now on
    folder = copy("calm")
    found = traced(lambda: desk.save(folder))
    assert found.code == SAVED
    numbers: Counter[str] = Counter()
    calls = []
    for line in found.lines:
        name = re.match(r"\d+ +(\w+)\(", line)
        if name is None:
            continue
        numbers[name[1]] += 1
        if name[1] != "openat" or "O_CREAT" in line:
            calls.append(Call(name[1], numbers[name[1]]))
    assert len(calls) > 40
    return calls


@pytest.mark.fault("crash at each file-system call of one save")
@pytest.mark.parametrize("what", ["the process dies", "the machine loses power"])
def test_a_save_that_crashes_at_any_call_leaves_the_older_checkpoint_or_the_new(
    what, desk, copy, calls, traced, count_injections, is_full
):
    every = 1 if is_full else 12
    chosen = calls[::-every]
    count_injections(len(chosen))
    kept = set()
    for index, call in enumerate(chosen):
        folder = copy(f"crash-{index}")
        crash = f"inject={call.name}:signal=KILL:when={call.number}"
        died = traced(lambda folder=folder: desk.save(folder), "-e", crash)
        assert died.code == -9, call
        if what == "the machine loses power":
            lose_what_was_not_flushed(died.lines)
        found = find_checkpoint(folder)
        assert found.skipped == (), call
        assert contents(found.path) in (contents(desk.folder / "checkpoint-2"), whole(desk)), call
        kept.add(found.path.name)
        desk.save(folder)
        assert contents(folder / "checkpoint-3") == whole(desk)
        assert sorted(path.name for path in folder.glob(".*")) == []
        shutil.rmtree(folder)
    assert kept == {"checkpoint-2", "checkpoint-3"}


@pytest.mark.fault("disk full, or failing, from a random write of one save on", quick=4, full=50)
def test_a_full_disk_leaves_the_older_checkpoint_whole_and_says_so(
    injection, desk, copy, calls, traced
):
    chance = random.Random(injection)
    call = chance.choice([call for call in calls if call.name in WRITES])
    folder = copy("full")

    def save():
        try:
            desk.save(folder)
        except CheckpointError as error:
            is_told = "checkpoint-2 is whole: free some space" in str(error)
            raise SystemExit(REFUSED if is_told else BROKEN) from error

    fails = f"inject={','.join(WRITES)}:error=ENOSPC:when={call.number}+"
    ended = traced(save, "-e", fails)
    assert ended.code == REFUSED, ended.lines[-5:]
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "events.jsonl"]
    assert contents(folder / "checkpoint-2") == contents(desk.folder / "checkpoint-2")
    desk.save(folder)
    assert contents(folder / "checkpoint-3") == whole(desk)


def whole(desk):
    """Return the contents of the checkpoint of the third step."""
    folder = desk.folder.parent / "whole"
    if not folder.exists():
        desk.save(folder)
    return contents(folder / "checkpoint-3")


def contents(checkpoint):
    """Return the files of a checkpoint that verifies, but for those that tell paths."""
    assert find_checkpoint(checkpoint.parent).path is not None
    return {
        path.name: path.read_bytes()
        for path in checkpoint.iterdir()
        if path.name not in (*CHANGING, SUMS_FILE)
    }


def lose_what_was_not_flushed(lines):
    """Cut files whose last bytes never reached the disk, wherever they were moved."""
    unflushed: set[str] = set()
    moved = []
    for line in lines:
        path = re.search(r"\(\d+<([^>]*)>", line)
        if path is not None and any(f" {name}(" in line for name in WRITES):
            unflushed.add(path[1])
        elif path is not None and " fsync(" in line and "= 0" in line:
            unflushed.discard(path[1])
        elif " rename" in line and "= 0" in line:
            moved.append(re.findall(r'"([^"]*)"', line))
    for name in unflushed:
        place = name
        for source, target in moved:
            if place.startswith(source):
                place = place.replace(source, target, 1)
        if os.path.isfile(place):
            os.truncate(place, 0)
