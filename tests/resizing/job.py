"""A small run that is the same in one process and sharded over several."""

import os
import traceback
from dataclasses import dataclass
from datetime import timedelta

import peft
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import rankflow as rf

CAPACITY = 5  # odd: two processes hold 3 and 2 rows
WIDTH = 6
BATCH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, 9)
        self.o = nn.Linear(9, WIDTH, bias=False)

    def forward(self, x):
        return x + self.o(torch.tanh(self.v(torch.tanh(self.q(x)))))


class Net(nn.Module):
    """Two blocks between an embedding and a head; its sites have three shapes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x).clone()  # FSDP2 warns of views


def make_model(*, shard=False, targets=("q", "v", "o", "embed"), seed=0, **config):
    torch.manual_seed(seed)
    config = {"r": CAPACITY, "lora_alpha": CAPACITY, **config}
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=list(targets), **config))
    if shard:
        shard_model(model)
    return model


def shard_model(model, **options):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.get_base_model().blocks:
        fully_shard(block, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)


def batches(steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        tokens = torch.randint(11, (BATCH, 3), generator=generator)
        yield tokens, torch.randint(3, (BATCH, 3), generator=generator)


def loss_of(model, tokens, labels):
    return functional.cross_entropy(model(tokens).flatten(0, 1), labels.flatten())


@dataclass(frozen=True)
class Loop:
    """How a run trains."""

    steps: int = 24
    accumulate: int = 1
    clip: float | None = None
    optimizer: type = torch.optim.AdamW
    options: tuple = (("lr", 3e-2), ("weight_decay", 0.1))


def train(model, budget, loop, *, after_step=None, flow=None):
    """Train on this process's part of every batch; return losses over the whole batch, and flow."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    flow = flow or rf.RankFlow(model, budget, total_steps=loop.steps)
    optimizer = loop.optimizer(
        [p for p in model.parameters() if p.requires_grad], **dict(loop.options)
    )
    losses = []
    for tokens, labels in batches(loop.steps):
        parts = list(zip(tokens.chunk(loop.accumulate), labels.chunk(loop.accumulate), strict=True))
        total = torch.zeros(())
        for i, (x, y) in enumerate(parts):
            if world > 1:
                model.set_requires_gradient_sync(i == len(parts) - 1)
            loss = loss_of(model, x.chunk(world)[rank], y.chunk(world)[rank]) / len(parts)
            loss.backward()
            total += loss.detach()
        if world > 1:
            dist.all_reduce(total)
        losses.append((total / world).item())
        if loop.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), loop.clip)
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        flow.step(optimizer)
        if after_step is not None:
            after_step(flow, optimizer)
    return losses, flow, optimizer


def in_processes(work, folder, *arguments, count=2):
    """Run ``work(*arguments)`` in forked processes of one job, and return what each returned."""
    pids = [_fork(work, folder, rank, count, arguments) for rank in range(count)]
    codes = [os.waitpid(pid, 0)[1] for pid in pids]
    errors = [(folder / f"error{r}").read_text() for r in range(count) if codes[r]]
    assert not errors, "\n".join(errors)
    return [torch.load(folder / f"result{r}", weights_only=False) for r in range(count)]


def _fork(work, folder, rank, count, arguments):
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/rendezvous",
            rank=rank,
            world_size=count,
            timeout=timedelta(seconds=60),
        )
        torch.save(work(*arguments), folder / f"result{rank}")
        dist.barrier()
        dist.destroy_process_group()
        code = 0
    except BaseException:
        (folder / f"error{rank}").write_text(traceback.format_exc())
    finally:
        os._exit(code)
