"""Faults on purpose: one test is one injection, and as many run as ``--full`` asks for.

A test with the mark ``fault("what happens", quick=3, full=200)`` and the argument ``injection``
runs 3 times, with ``--full`` 200 times; one that injects by itself says how often through
``count_injections``. ``--results FILE`` writes what was injected and survived into the table there.
"""

import json
import os
import re
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rankflow.checkpoint import find_checkpoint
from rankflow.specs.run import load_run
from rankflow.training.run import train

STEPS = 12
RUN = f"""
name = "trial"
[model]
name = "bert"
task = "sequence-classification"
pooling = "mean"
[data]
train = "rows.jsonl"
max_length = 16
[adapter]
use_dora = true
[budget]
rank = 1.5
start = 2
schedule = "linear"
warmup = 2
cooldown = 3
every = 3
recycle = 0.3
[train]
max_steps = {STEPS}
per_device_train_batch_size = 4
learning_rate = 0.02
logging_steps = 2
save_steps = 1
report_to = "none"
use_cpu = true
"""


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="inject as often as RESULTS.md says")
    parser.addoption("--results", type=Path, help="put the counts into this file's table")


def pytest_generate_tests(metafunc):
    if "injection" in metafunc.fixturenames:
        fault = metafunc.definition.get_closest_marker("fault")
        is_full = metafunc.config.getoption("full", False)
        count = fault.kwargs["full" if is_full else "quick"]
        metafunc.parametrize("injection", range(count))


def pytest_collection_modifyitems(items):
    for item in items:
        fault = item.get_closest_marker("fault")
        if fault is not None:
            item.user_properties.append(("fault", fault.args[0]))


def pytest_terminal_summary(terminalreporter, config):
    path = config.getoption("results", None)
    if path is None:
        return
    injected, survived = Counter(), Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            properties = dict(report.user_properties)
            if report.when == "call" and "fault" in properties:
                count = properties.get("injections", 1)
                injected[properties["fault"]] += count
                survived[properties["fault"]] += count if outcome == "passed" else 0
    text = path.read_text()
    for fault, count in injected.items():
        row = f"| {fault} | {count:,} | {survived[fault]:,} |"
        text, found = re.subn(rf"^\| {re.escape(fault)} \|.*$", row, text, flags=re.M)
        assert found == 1, f"{path} has no row for {fault!r}"
    path.write_text(text)


@pytest.fixture
def is_full(request):
    """Whether to inject as often as RESULTS.md says."""
    return request.config.getoption("full", False)


@pytest.fixture
def count_injections(request):
    """Say how many injections a test made by itself."""
    return lambda count: request.node.user_properties.append(("injections", count))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """A child that is forked has no threads but the one that forked it."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Child:
    """A forked process.

    Attributes:
        pid: Its number.
        log: What it printed.
    """

    pid: int
    log: Path

    def wait(self, seconds: float = 120) -> int:
        """Return its exit code once it has ended, or minus the signal that ended it."""
        return os.waitstatus_to_exitcode(self._status(time.monotonic() + seconds))

    def wait_until(self, condition: Callable[[], object], seconds: float = 60) -> None:
        """Wait for something that it does."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.002)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    def _status(self, end: float) -> int:
        while True:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                return status
            if time.monotonic() > end:
                self.kill()
                os.waitpid(self.pid, 0)
                raise AssertionError(f"it hung:\n{self.log.read_text()}")
            time.sleep(0.002)


def fork(work: Callable[[], object], log: Path) -> Child:
    """Run a function in a process of its own; an exception ends it with code 1."""
    pid = os.fork()
    if pid:
        return Child(pid, log)
    code = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        stream = os.fdopen(output, "w", buffering=1)
        sys.stdout = sys.stderr = stream  # in place of pytest's
        work()
        code = 0
    except SystemExit as exit_:
        code = exit_.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@pytest.fixture
def forked(tmp_path):
    """Run a function in a process of its own."""
    return lambda work: fork(work, tmp_path / "log")


def make_tokenizer():
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "fine", "poor", "a", "film"]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]"
    )


@pytest.fixture(scope="session")
def desk(tmp_path_factory):
    """A folder with a tiny encoder that has dropout, rows, and a run spec."""
    folder = tmp_path_factory.mktemp("desk")
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=10,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
    )
    BertModel(config).save_pretrained(folder / "bert")
    make_tokenizer().save_pretrained(folder / "bert")
    pairs = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no")]
    rows = [{"text": f"{w} a film" + " a" * n, "label": y} for n in range(5) for w, y in pairs]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "run.toml").write_text(RUN)
    return folder


@dataclass(frozen=True)
class Run:
    """A run of ``rankflow train`` with events, a checkpoint after every step, and an export.

    Attributes:
        spec: Its run file.
        folder: Where it writes.
    """

    spec: Path
    folder: Path

    def train(self, *, resume: bool = False) -> None:
        """Train it, printing to stdout."""
        spec = load_run(self.spec, [f"train.output_dir={self.folder}"])
        train(spec, console=Console(), resume=resume)

    def last_saved(self) -> int:
        """Return the step of the newest checkpoint that verifies; 0 if there is none."""
        path = find_checkpoint(self.folder).path
        return 0 if path is None else int(path.name.removeprefix("checkpoint-"))

    def outcome(self) -> dict[str, object]:
        """Return everything that a run leaves behind, but for times."""
        last = self.folder / f"checkpoint-{STEPS}"
        events = [json.loads(x) for x in (self.folder / "events.jsonl").read_text().splitlines()]
        progress = json.loads((last / "trainer_state.json").read_text())
        optimizer = torch.load(last / "optimizer.pt", weights_only=True)
        tensors = {
            **load_file(last / "adapter_model.safetensors"),
            **load_file(last / "rankflow_state.safetensors"),
            **{f"export {k}": v for k, v in load_file(self._export).items()},
            **{
                f"optimizer {index} {key}": value
                for index, state in optimizer["state"].items()
                for key, value in state.items()
            },
        }
        return {
            "events": [event | {"seconds": 0} for event in events],
            "losses": [entry for entry in progress["log_history"] if "loss" in entry],
            "tensors": {k: (v.dtype, v.shape, v.numpy().tobytes()) for k, v in tensors.items()},
            "generators": (last / "rng_state.pth").read_bytes(),
            "rates": (last / "scheduler.pt").read_bytes(),
            "groups": optimizer["param_groups"],
        }

    @property
    def _export(self) -> Path:
        return self.folder / "adapter" / "adapter_model.safetensors"


@pytest.fixture
def run(desk, tmp_path):
    """A run that has not begun."""
    return Run(desk / "run.toml", tmp_path / "run")


@pytest.fixture(scope="session")
def whole(desk, tmp_path_factory):
    """What the run leaves behind if nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(desk / "run.toml", folder / "run")
    assert fork(run.train, folder / "log").wait() == 0, (folder / "log").read_text()
    outcome = run.outcome()
    assert len(outcome["events"]) >= 3
    assert len(outcome["losses"]) == STEPS // 2
    return outcome
