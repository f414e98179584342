"""A small run that is the same in one process and sharded over several."""

from dataclasses import dataclass, field

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional

import rankflow as rf

CAPACITY = 5  # odd: two processes hold 3 and 2 slots
WIDTH = 6
BATCH = 8
BUDGET = {"rank": 2, "max_rank": CAPACITY, "every": 4, "protect": 1, "warmup": 4, "cooldown": 4}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.v = nn.Linear(WIDTH, 9)
        self.o = nn.Linear(9, WIDTH, bias=False)

    def forward(self, x):
        return x + self.o(torch.tanh(self.v(torch.tanh(self.q(x)))))


class Net(nn.Module):
    """Two blocks between an embedding and a convolution; its sites have five shapes."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.conv = nn.Conv1d(3, 3, 3, padding=1)  # over three tokens; its rank is 3 at most
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = torch.tanh(self.conv(x))
        return self.head(x).clone()  # FSDP2 warns of views


@dataclass(frozen=True)
class Job:
    """A run: what it trains, under which budget, and how.

    ``train`` is the same code in one process and under FSDP2.
    """

    budget: dict = field(default_factory=dict)
    steps: int = 24
    accumulate: int = 1
    clip: float | None = None
    evaluate: bool = False
    optimizer: type = torch.optim.AdamW
    options: dict = field(default_factory=lambda: {"lr": 3e-2, "weight_decay": 0.1})
    config: dict = field(default_factory=dict)
    sharding: dict = field(default_factory=dict)
    leaves: bool = False

    def base(self):
        torch.manual_seed(0)
        return Net()

    def model(self):
        return self.model_of(shard=dist.is_initialized())

    def model_of(self, *, shard):
        config = {"r": CAPACITY, "lora_alpha": CAPACITY, **self.config}
        targets = ["q", "v", "o", "embed", "conv"]
        model = peft.get_peft_model(
            self.base(), peft.LoraConfig(**{"target_modules": targets, **config})
        )
        if shard:
            self.shard(model)
        return model

    def shard(self, model):
        for block in model.get_base_model().blocks:
            if self.leaves:  # as accelerate shards what PEFT trains
                for name, module in block.named_modules():
                    if ".lora_" in name and isinstance(module, nn.Linear):
                        fully_shard(module, **self.sharding)
            fully_shard(block, **self.sharding)
        fully_shard(model, **self.sharding)

    def flow(self, model, **options):
        budget = rf.load_budget("reallocate", **{**BUDGET, **self.budget})
        return rf.RankFlow(model, budget, total_steps=self.steps, **options)

    def make_optimizer(self, model):
        return self.optimizer([p for p in model.parameters() if p.requires_grad], **self.options)

    def batches(self):
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.steps):
            tokens = torch.randint(11, (BATCH, 3), generator=generator)
            yield tokens, torch.randint(3, (BATCH, 3), generator=generator)

    def outputs(self, model):
        """Outputs on one batch, equal in all processes."""
        with torch.no_grad():
            return model(next(self.batches())[0])

    def step(self, model, flow, optimizer, batch):
        """Take one step on this process's part of a batch; return the loss over all of it."""
        parts = [part.chunk(self.accumulate) for part in batch]
        total = torch.zeros(())
        for i, (tokens, labels) in enumerate(zip(*parts, strict=True)):
            if dist.is_initialized():
                model.set_requires_gradient_sync(i == self.accumulate - 1)
            here = _share(tokens), _share(labels).flatten()
            loss = functional.cross_entropy(model(here[0]).flatten(0, 1), here[1])
            (loss / self.accumulate).backward()
            total += loss.detach() / self.accumulate
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        if self.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        flow.observe()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if self.evaluate:
            self.outputs(model)
        flow.step(optimizer)
        return total.item()

    def train(self, after_step=None):
        """Return the losses and the engine."""
        model = self.model()
        flow = self.flow(model)
        optimizer = self.make_optimizer(model)
        losses = []
        for batch in self.batches():
            losses.append(self.step(model, flow, optimizer, batch))
            if after_step is not None:
                after_step(flow, optimizer)
        return losses, flow


def _share(batch):
    if not dist.is_initialized():
        return batch
    return batch.chunk(dist.get_world_size())[dist.get_rank()]


@pytest.fixture
def job():
    """The class of runs."""
    return Job
