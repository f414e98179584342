"""Runs under DistributedDataParallel are the runs of one process on the same global batches.

All in fp32. Sums over the batch are taken in another order, so losses differ in the last digits;
ranks, births and deaths are the same, and processes agree bit for bit.
"""

import os
from contextlib import nullcontext
from itertools import pairwise

import peft
import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch import nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from transformers import Trainer, TrainingArguments

from rankflow.engine import RankFlow
from rankflow.fingerprint import fingerprints
from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

STEPS, BATCH, TOLERANCE = 24, 16, 1e-5
MOVES = {
    "rank": 1.0,
    "warmup": 2,
    "cooldown": 4,
    "every": 3,
    "recycle": 0.9,
    "hysteresis": 0.0,
    "protect": 0,
    "decay": 0.5,
    "grow_steps": 2,
}
KINDS = {
    "LoRA": BudgetSpec(**MOVES),
    "DoRA": BudgetSpec(**MOVES | {"rank": 2.5}),
    "DoRA, magnitudes budgeted": BudgetSpec(**MOVES, magnitude="budgeted"),
    "gated": BudgetSpec(**MOVES, components="gated"),
    "VeRA": BudgetSpec(**MOVES | {"rank": None, "params": 46}, max_rank=6, components="vera"),
}
OPTIONS = {
    "plain": {},
    "unused parameters": {"find_unused_parameters": True},
    "bucket view": {"gradient_as_bucket_view": True},
    "static graph": {"static_graph": True},
    "static graph, bucket view": {"static_graph": True, "gradient_as_bucket_view": True},
}


class Net(nn.Module):
    """Four layers of different shapes and a head."""

    def __init__(self):
        super().__init__()
        widths = [6, 12, 8, 10, 5]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x)


def make_model(kind):
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        use_dora=kind.startswith("DoRA"),
        target_modules=r"layers\.\d",
        modules_to_save=["head"],
    )
    return peft.get_peft_model(Net(), config)


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 6, generator=generator)
    return x, (x[:, :3] * torch.tensor([1.0, -2.0, 0.5])).argmax(1)


def train(kind, number=0, count=1, *, micro=1, options=None, first="engine", keep_zeros=False):
    """Train this process's share of every batch, and return what there is to compare."""
    model = make_model(kind)
    wrapper = None
    if count > 1 and first == "wrapper":
        wrapper = DistributedDataParallel(model, **options or {})
    flow = RankFlow(model, KINDS[kind], STEPS)
    if count > 1 and first == "engine":
        wrapper = DistributedDataParallel(model, **options or {})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    flow.attach(optimizer)
    losses, ranks, scores = [], [], []
    for step in range(STEPS):
        shares = zip(*(part.chunk(count * micro) for part in batch_of(step)), strict=True)
        mine = list(shares)[number * micro : (number + 1) * micro]
        loss = 0.0
        for index, (x, y) in enumerate(mine):
            # torch itself cannot begin a static graph with a pass that is not reduced.
            waits = index < micro - 1 and (step > 0 or "static_graph" not in (options or {}))
            with wrapper.no_sync() if wrapper and waits else nullcontext():
                part = functional.cross_entropy((wrapper or model)(x), y) / micro
                part.backward()
            loss += part.detach()
        clip_grad_norm_(model.parameters(), 0.1)
        flow.observe()
        scores.append(torch.cat([t.flatten() for t in flow._observers.tracker.tensors().values()]))
        optimizer.step()
        optimizer.zero_grad(set_to_none=not keep_zeros)
        flow.step(optimizer)
        if count > 1:
            dist.all_reduce(loss)
        losses.append(loss.item() / count)
        ranks.append(list(flow.ranks.values()))
    moved = [(len(event.pruned), len(event.born)) for event in flow.history]
    return {
        "losses": losses,
        "ranks": ranks,
        "moved": moved,
        "scores": scores,
        "prints": fingerprints(flow._sites, optimizer),
        "weights": [p.detach().clone() for p in model.parameters()],
    }


def assert_same_run(many, one):
    for each in many:
        assert each["ranks"] == one["ranks"]
        assert each["moved"] == one["moved"]
        assert each["losses"] == pytest.approx(one["losses"], rel=TOLERANCE)
        assert each["prints"] == many[0]["prints"]
        assert all(map(torch.equal, each["weights"], many[0]["weights"]))
        assert all(map(torch.equal, each["scores"], many[0]["scores"]))
        # Scores are squares of gradients, which have moved apart with the weights.
        for found, expected in zip(each["scores"], one["scores"], strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max())


def comes_back(ranks):
    """Whether a site goes to rank 0 and has components again later."""
    dead, back = set(), False
    for step in ranks:
        back = back or any(rank > 0 and site in dead for site, rank in enumerate(step))
        dead |= {site for site, rank in enumerate(step) if rank == 0}
    return back


@pytest.fixture(scope="module")
def one():
    """The run of one process, of each kind."""
    return {kind: train(kind) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(kind, one, in_processes):
    assert any(born for _, born in one[kind]["moved"])
    assert_same_run(in_processes(2, lambda number: train(kind, number, 2)), one[kind])


def test_sites_die_and_come_back_in_these_runs(one):
    assert comes_back(one["LoRA"]["ranks"])
    assert comes_back(one["DoRA, magnitudes budgeted"]["ranks"])


@pytest.mark.parametrize("first", ["engine", "wrapper"])
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_does_under_every_option(options, micro, first, one, in_processes):
    def work(number):
        return train("LoRA", number, 2, micro=micro, options=options, first=first)

    assert_same_run(in_processes(2, work), one["LoRA"])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_does_where_gradients_are_set_to_zero_instead_of_none(options, one, in_processes):
    def work(number):
        return train("LoRA", number, 2, options=options, keep_zeros=True)

    assert_same_run(in_processes(2, work), one["LoRA"])


@pytest.mark.distributed
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_four_processes_train_as_one(kind, options, micro, one, in_processes):
    def work(number):
        return train(kind, number, 4, micro=micro, options=options)

    assert_same_run(in_processes(4, work), one[kind])


def test_a_step_without_an_event_tells_nobody_anything(in_processes):
    names = ("all_reduce", "broadcast", "broadcast_object_list", "all_gather_object")

    def work(number):
        model = make_model("DoRA")
        flow = RankFlow(model, KINDS["DoRA"], STEPS)
        wrapper = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
        called = []
        for name in (*names, "monitored_barrier"):
            setattr(dist, name, noted(getattr(dist, name), called))
        told = []
        for step in range(STEPS):
            x, y = batch_of(step)
            functional.cross_entropy(wrapper(x), y).backward()
            called.clear()
            flow.observe()
            optimizer.step()
            optimizer.zero_grad()
            event = flow.step(optimizer)
            told.append((len(called), event is not None))
        return told

    for told in in_processes(2, work):
        after = [True, *(is_event for _, is_event in told)]
        for (calls, is_event), follows in zip(told, after, strict=False):
            assert (calls > 0) == (is_event or follows)
            assert calls <= 1 or is_event


def noted(function, called):
    def call(*arguments, **keywords):
        called.append(function)
        return function(*arguments, **keywords)

    return call


class Rows(torch.utils.data.Dataset):
    """The batches of ``batch_of`` one after the other."""

    def __init__(self):
        parts = [batch_of(step) for step in range(STEPS)]
        self.x, self.y = (torch.cat(each) for each in zip(*parts, strict=True))

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "labels": self.y[index]}


class WithLoss(Net):
    def forward(self, x, labels):
        logits = super().forward(x)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


def train_by(make_trainer, folder, number=0, count=1, **settings):
    """Train by a Trainer, and return what there is to compare."""
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("WORLD_SIZE", None)
    if count > 1:
        for name in ("RANK", "LOCAL_RANK"):
            os.environ[name] = str(number)
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ[name] = str(count)
    torch.manual_seed(0)
    targets = {"target_modules": r"layers\.\d", "modules_to_save": ["head"]}
    model = peft.get_peft_model(WithLoss(), peft.LoraConfig(r=3, lora_alpha=6, **targets))
    args = TrainingArguments(
        str(folder),
        max_steps=STEPS,
        learning_rate=0.02,
        max_grad_norm=0.1,
        lr_scheduler_type="constant",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        dataloader_pin_memory=False,
        save_strategy="no",
        train_sampling_strategy="sequential",
        **settings,
    )
    trainer = make_trainer(model=model, args=args, train_dataset=Rows())
    assert args.world_size == count
    trainer.train()
    (flow,) = [
        each.flow
        for each in trainer.callback_handler.callbacks
        if isinstance(each, RankFlowCallback)
    ]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    moved = [(event.ranks, len(event.born)) for event in flow.history]
    return losses, moved, fingerprints(flow._sites, trainer.optimizer.optimizer)


TRAINERS = {
    "RankFlowTrainer": lambda **kw: RankFlowTrainer(budget=KINDS["LoRA"], **kw),
    "callback": lambda **kw: Trainer(callbacks=[RankFlowCallback(KINDS["LoRA"])], **kw),
}


@pytest.mark.parametrize("make", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainers_train_in_two_processes_as_in_one(make, accumulation, in_processes, tmp_path):
    def one(number):
        return train_by(make, tmp_path / "one", per_device_train_batch_size=BATCH)

    def two(number):
        settings = {
            "per_device_train_batch_size": BATCH // 2 // accumulation,
            "gradient_accumulation_steps": accumulation,
        }
        return train_by(make, tmp_path / "two", number, 2, **settings)

    (losses, moved, _), ended = in_processes(1, one)[0], in_processes(2, two)
    assert any(born for _, born in moved)
    for found, others, prints in ended:
        assert others == moved
        assert prints == ended[0][2]
        assert found == pytest.approx(losses, rel=TOLERANCE)
    assert (tmp_path / "two" / "events.jsonl").read_text().count("\n") == len(moved)
