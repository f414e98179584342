"""Numbers that are not finite, injected into runs: once, or from a step on.

A bad step must be as if it had not counted, and a run that stays bad must stop with the cause and
leave its last checkpoint whole, finite, and good to go on from.
"""

import gc
import itertools
from dataclasses import dataclass, replace

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from transformers import Trainer, TrainingArguments

from rankflow.adapters.sites import find_sites
from rankflow.checkpoint import find_checkpoint
from rankflow.engine import RankFlow
from rankflow.errors import DivergenceError, ExportError
from rankflow.export.peft import export_adapter
from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

STEPS, BAD, LIMIT = 14, 5, 4  # the fault is in the sixth step; an event has been before it
BUDGET = BudgetSpec(
    rank=1.5, warmup=2, cooldown=2, every=4, decay=0.5, protect=1, recycle=0.5, grow_steps=3
)
SITE = "bert.encoder.layer.1.attention.self.query"
NUMBERS = {"NaN": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "1e30": 1e30}
PLACES = ("loss", "gradient", "head", "activation")
LOOPS = ("own loop", "own loop that mutes", "Trainer", "RankFlowTrainer")


@dataclass(frozen=True)
class Case:
    """What is injected, where, for how long, and into what."""

    number: str
    place: str
    persists: bool
    use_dora: bool
    accumulation: int
    loop: str

    def __str__(self):
        kind = "DoRA" if self.use_dora else "LoRA"
        span = "from then on" if self.persists else "once"
        return f"{self.number} in {self.place}, {span}, {kind} x{self.accumulation}, {self.loop}"


CASES = [
    Case(*combination)
    for combination in itertools.product(
        NUMBERS, PLACES, (False, True), (False, True), (1, 2), LOOPS
    )
    # A single large entry of an activation is normalised away, and training goes on.
    if combination[:2] != ("1e30", "activation")
]


@pytest.fixture(autouse=True, scope="module")
def frozen_imports():
    """Every Trainer collects garbage when it begins, which takes longer than these runs."""
    gc.freeze()
    yield
    gc.unfreeze()


def make_model(use_dora):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = transformers.BertForSequenceClassification(config)
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        use_dora=use_dora,
        target_modules=["query", "value", "dense"],
        task_type="SEQ_CLS",
    )
    return peft.get_peft_model(base, lora)


def make_rows():
    tokens = torch.randint(1, 13, (24, 6), generator=torch.Generator().manual_seed(2))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3}
        for row in tokens
    ]


class Fault:
    """Spoils the first micro-batch of a step, or of all steps from one on."""

    def __init__(self, case, model):
        self.case, self.model = case, model
        self.number = NUMBERS[case.number]
        self.handle = None
        self.last = -1
        self.cured = False
        self.sites = []

    def begin(self, step):
        """Prepare the next micro-batch of a step."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
        is_first, self.last = step != self.last, step
        is_due = step >= BAD if self.case.persists else step == BAD
        if is_first and is_due and not self.cured:
            self.handle = getattr(self, f"in_{self.case.place}")()

    def in_loss(self):
        def spoil(module, inputs, output):
            output["loss"] = output["loss"] * self.number

        return self.model.get_base_model().register_forward_hook(spoil)

    def in_gradient(self):
        site = [site for site in find_sites(self.model) if site.rank > 0][3]
        self.sites.append(f"site {site.name!r}")
        return site.B.register_hook(self.spoil_entry)

    def in_head(self):
        self.sites.append("task head")
        head = [p for n, p in self.model.named_parameters() if "classifier" in n]
        return next(p for p in head if p.requires_grad).register_hook(self.spoil_entry)

    def in_activation(self):
        self.sites.append(f"site {SITE!r}")
        layer = self.model.get_base_model().get_submodule(SITE).base_layer
        return layer.register_forward_hook(lambda module, x, output: self.spoil_entry(output))

    def spoil_entry(self, tensor):
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = self.number
        return spoilt


class NoFault:
    """The step at which the fault would be never happens; the optimizer sees zero gradients."""

    def begin(self, step):
        """Prepare nothing."""


class OwnLoop:
    """A loop as in the README, that clips."""

    def __init__(self, case, folder, make_fault):
        self.case, self.folder = case, folder
        self.model = make_model(case.use_dora)
        self.flow = RankFlow(self.model, BUDGET, STEPS, max_bad_steps=LIMIT)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=0.02)
        self.fault = make_fault(self.model)

    def train(self):
        for step in range(STEPS):
            if step == BAD and isinstance(self.fault, NoFault):
                self.skip()
            else:
                self.observe(step)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.flow.step(self.optimizer)
        self.flow.finish()

    def skip(self):
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def observe(self, step):
        total = torch.zeros(())
        parts = self.case.accumulation
        for micro in range(parts):
            self.fault.begin(step)
            rows = make_rows()[(8 * step + micro) % 24 :][: 4 // parts]
            loss = self.model(**{k: torch.stack([row[k] for row in rows]) for k in rows[0]}).loss
            (loss / parts).backward()
            total += loss.detach()
        self.fault.begin(-1)
        nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], 1.0)
        self.flow.observe(loss=total)
        if self.case.loop == "own loop that mutes":
            self.flow.mute_bad_step()


class InTrainer:
    """A Trainer with the callback, or RankFlowTrainer."""

    def __init__(self, case, folder, make_fault):
        self.case, self.folder = case, folder
        self.model = make_model(case.use_dora)
        self.fault = make_fault(self.model)
        self.trainer, self.callback = self.make_trainer()

    def make_trainer(self):
        settings = TrainingArguments(
            output_dir=str(self.folder),
            max_steps=STEPS,
            per_device_train_batch_size=4 // self.case.accumulation,
            gradient_accumulation_steps=self.case.accumulation,
            learning_rate=0.02,
            logging_steps=5,
            save_steps=2,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        arguments = {"model": self.model, "args": settings, "train_dataset": make_rows()}
        if self.case.loop == "Trainer":
            callback = RankFlowCallback(BUDGET, max_bad_steps=LIMIT)
            trainer = Trainer(**arguments, callbacks=[callback])
        else:
            trainer = RankFlowTrainer(**arguments, budget=BUDGET, max_bad_steps=LIMIT)
            callback = trainer.rankflow
        self.intrude(trainer, callback)
        return trainer, callback

    def intrude(self, trainer, callback):
        train, observe = trainer.training_step, callback.on_pre_optimizer_step
        skips = isinstance(self.fault, NoFault)

        def training_step(model, inputs, items=None):
            if skips and trainer.state.global_step == BAD:
                OwnLoop.skip(self)
                return torch.zeros(())
            self.fault.begin(trainer.state.global_step)
            return train(model, inputs, items)

        def on_pre_optimizer_step(args, state, control, **more):
            if not (skips and state.global_step == BAD):
                observe(args, state, control, **more)

        trainer.training_step = training_step
        callback.on_pre_optimizer_step = on_pre_optimizer_step

    @property
    def flow(self):
        return self.callback.flow

    def train(self):
        self.trainer.train()

    def resume(self):
        """Go on without the fault, in a new process as it were."""
        self.model = make_model(self.case.use_dora)
        self.fault.cured = True
        self.trainer, self.callback = self.make_trainer()
        plain = self.case.loop == "Trainer"
        self.trainer.train(
            resume_from_checkpoint=self.callback.resume(self.trainer) if plain else True
        )


def make_run(case, folder, make_fault):
    return (OwnLoop if case.loop.startswith("own") else InTrainer)(case, folder, make_fault)


def is_finite(tensors):
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def knowledge(flow):
    """What the engine has learned from the steps, and done about it."""
    state = flow.state_dict()
    del state["observed"], state["bad_steps"]
    return state | {"history": [replace(event, seconds=0.0) for event in flow.history]}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[key])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def inject(case, folder):
    """Run a case, and check what must hold."""
    run = make_run(case, folder / "run", lambda model: Fault(case, model))
    # An optimizer that takes a bad step is lost; clipping makes zeros of a norm that overflows.
    is_taken = case.loop == "own loop" and case.number != "1e30"
    if case.persists or is_taken:
        with pytest.raises(DivergenceError) as caught:
            run.train()
        check_stop(case, run, str(caught.value))
    else:
        run.train()
        assert is_finite(run.model.parameters())
        reference = make_run(case, folder / "reference", lambda model: NoFault())
        reference.train()
        assert_same(knowledge(run.flow), knowledge(reference.flow))
        assert_same(run.model.state_dict(), reference.model.state_dict())


def check_stop(case, run, message):
    assert run.flow.steps <= BAD + LIMIT + 1
    assert "lower" in message
    assert is_finite(run.flow.state_dict()["scorer"].values())
    if case.loop == "own loop":  # the optimizer has spread it over the weights
        check_no_adapter(run, message)
        return
    assert f"the first is step {BAD + 1}:" in message
    assert case.place == "loss" or any(site in message for site in run.fault.sites)
    assert is_finite(run.model.parameters())
    if isinstance(run, InTrainer):
        check_checkpoint(run)


def check_no_adapter(run, message):
    assert f"step {BAD + 1}" in message
    if not is_finite(run.model.parameters()):
        with pytest.raises(DivergenceError, match="not finite; training has diverged"):
            run.flow.finish()
        with pytest.raises(ExportError, match="not finite"):
            export_adapter(run.model, run.folder / "adapter")
        assert not (run.folder / "adapter").exists()


def check_checkpoint(run):
    found = find_checkpoint(run.folder)
    assert found.skipped == ()
    step = int(found.path.name.partition("-")[2])
    assert BAD - 2 < step <= BAD + LIMIT
    assert is_finite(load_file(found.path / "adapter_model.safetensors").values())
    run.resume()
    assert run.flow.steps == STEPS
    assert is_finite(run.model.parameters())


@pytest.mark.fault("NaN, infinity or 1e30 in a step, or in all from it on", quick=10, full=160)
def test_a_bad_step_does_not_count_and_a_run_that_stays_bad_stops_with_the_cause(
    injection, tmp_path
):
    case = CASES[(3 + 49 * injection) % len(CASES)]
    print(case)
    inject(case, tmp_path)
