"""What training would cost on an H200, from counts and a data sheet; nothing here was measured.

    python examples/benchmarks/on_paper.py

The very code that trains is run for a step on tensors without numbers, with its kernels in place,
and every operation is counted (`rankflow.bench.ledger`): one layer and two layers tell what a layer
costs, and models are stacks of equal layers. An operation takes as long as its products at 70% of
the peak in bf16 and 80% in float32, its traffic at 85% of the bandwidth, or 3 microseconds,
whichever is longest (`rankflow.bench.machine`). The host is taken to keep up. 4096 tokens, weights
in bf16, no gradient checkpointing, one device of unlimited memory; embedding and head are left out.
The hybrid's budget begins at 1.5 times the others', and its peak is that of steps with gradients
sketched. Of its engine the traffic is told as shares of a step: that of `observe` if the score is
`taylor`, and that of an event that moves all rows of the adapter.
"""

from dataclasses import dataclass
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

from rankflow.adapters import compose, row_norms
from rankflow.bench.ledger import Ledger
from rankflow.bench.machine import H200
from rankflow.bench.shapes import LLAMA3_8B, LLAMA3_70B, LLAMA3_405B, Shape
from rankflow.bench.trainee import EVERY, PRESETS, Adapter, Trainee, Workload, adapt, draw_states
from rankflow.memory import tally_bytes
from rankflow.training.fake import fake_tensors

TOKENS = 4096
RUN = 1000  # steps of a run
RANKS = (8, 32, 128, 384)
SHAPES = (LLAMA3_8B, LLAMA3_70B, LLAMA3_405B)
ADAPTED = (Adapter.PEFT_LORA, Adapter.PEFT_DORA, Adapter.DORA, Adapter.HYBRID)
COMPARED = (Adapter.NONE, Adapter.PEFT_LORA, Adapter.PEFT_DORA)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step costs: its seconds, and the most bytes that it holds at a time."""

    seconds: float
    peak: int

    def stacked(self, second: "Cost", layers: int) -> "Cost":
        """Return the cost of many layers, given those of one and of two."""
        more = layers - 1
        return Cost(
            self.seconds + more * (second.seconds - self.seconds),
            self.peak + more * (second.peak - self.peak),
        )


def count(shape: Shape, layers: int, adapter: Adapter, rank: int) -> Cost:
    """Run a step without numbers, and count."""
    workload = Workload(shape, layers, TOKENS, torch.bfloat16)
    model = adapt(workload, adapter, rank, torch.device("meta"), RUN)
    as_on_gpu = [patch.object(module, "fits", lambda *_: True) for module in (compose, row_norms)]
    with fake_tensors(model, torch.device("cpu")), as_on_gpu[0], as_on_gpu[1]:
        states = draw_states(workload, torch.device("cpu"))
        trainee = Trainee(model, adapter, rank, states, RUN, foreach=True)
        trainee.train()  # the optimizer has its state from the first step on
        with Ledger() as ledger:
            trainee.train()
        rest = EVERY - 3 if adapter in PRESETS else 1  # to the last sketched step before an event

        def train() -> None:
            for _ in range(rest):
                trainee.train()

        return Cost(H200.seconds(ledger.operations), tally_bytes(train, trainee.held))


def predict(shape: Shape, adapter: Adapter, rank: int) -> Cost:
    """Return the cost of all layers."""
    first, second = (count(shape, layers, adapter, rank) for layers in (1, 2))
    return first.stacked(second, shape.layers)


def engine_seconds(shape: Shape, rank: int) -> tuple[float, float]:
    """Return the seconds that scores take of a step, and tensors of an event."""
    keys = shape.hidden * shape.kv_heads // shape.heads
    ins = 6 * shape.hidden + shape.intermediate
    outs = 3 * shape.hidden + 2 * keys + 2 * shape.intermediate
    A, adapter = (4 * shape.layers * rank * width for width in (ins, ins + outs))
    scores = 2 * A + adapter  # the gate gradient, and the norm of every gradient
    event = 3 * 2 * adapter  # weights and two moments are read and written
    return scores / H200.bandwidth, event / H200.bandwidth


def main() -> None:
    """Print a table for every model."""
    logging.set_verbosity_error()
    console = Console(width=120)
    for shape in SHAPES:
        table = Table(
            "rank", "adapter", "step ms", "of none", "of PEFT LoRA", "of PEFT DoRA", "peak GiB",
            "of PEFT LoRA", "scores", "event", box=None,
            title=f"{shape.name}, {TOKENS} tokens, on paper",
        )  # fmt: skip
        bare = predict(shape, Adapter.NONE, 0)
        for rank in RANKS:
            costs = {Adapter.NONE: bare}
            costs |= {adapter: predict(shape, adapter, rank) for adapter in ADAPTED}
            for adapter in ADAPTED:
                cost = costs[adapter]
                engine: list[str] = []
                if adapter is Adapter.HYBRID:
                    engine = [f"{each / cost.seconds:.2%}" for each in engine_seconds(shape, rank)]
                table.add_row(
                    str(rank),
                    adapter.value,
                    f"{cost.seconds * 1e3:.0f}",
                    *(f"{cost.seconds / costs[other].seconds:.2f}x" for other in COMPARED),
                    f"{cost.peak / 2**30:.0f}",
                    f"{cost.peak / costs[Adapter.PEFT_LORA].peak:.2f}x",
                    *engine,
                )
        console.print(table)


if __name__ == "__main__":
    main()
