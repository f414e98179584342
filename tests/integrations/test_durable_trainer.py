import errno
import json
import multiprocessing
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankflow.checkpoint import find_checkpoint
from rankflow.durable import claim, find_damage, seal
from rankflow.errors import CheckpointError, RankFlowError
from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.specs.budget import BudgetSpec

STEPS = 12
BUDGET = BudgetSpec(
    rank=1.5, start=2, schedule="linear", warmup=2, cooldown=3, every=3, recycle=0.3, protect=1
)


BEST = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2}


def make_arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 5,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(**settings | changes)


def make_parts(folder, **settings):
    """Return what every Trainer takes."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
    )
    model = peft.get_peft_model(
        transformers.BertForSequenceClassification(config),
        peft.LoraConfig(target_modules=["query", "value", "dense"], task_type="SEQ_CLS"),
    )
    tokens = torch.randint(1, 13, (20, 6), generator=torch.Generator().manual_seed(2))
    rows = [{"input_ids": row, "labels": row[0] % 3} for row in tokens]
    arguments = make_arguments(folder, **settings)
    return {"model": model, "args": arguments, "train_dataset": rows, "eval_dataset": rows}


def make_trainer(folder, callbacks=(), **settings):
    parts = make_parts(folder, **settings)
    return RankFlowTrainer(**parts, budget=BUDGET, callbacks=list(callbacks))


def make_plain(folder, callbacks=(), **settings):
    """Return a Trainer of transformers, and the callback that steers it."""
    callback = RankFlowCallback(BUDGET)
    return Trainer(**make_parts(folder, **settings), callbacks=[callback, *callbacks]), callback


def checkpoints(folder):
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("check*"))


def end_of(trainer, flow):
    """Return parameters, optimizer state and events of a run that has ended."""
    moments = trainer.optimizer.state_dict()["state"]
    return (
        [p.detach().numpy().tobytes() for p in trainer.model.parameters() if p.requires_grad],
        [value.numpy().tobytes() for state in moments.values() for value in state.values()],
        [replace(event, seconds=0.0) for event in flow.history],
    )


def losses(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


class At(TrainerCallback):
    """Does something whenever a checkpoint was saved, or after a step."""

    def __init__(self, moment, action):
        self._moment, self._action = moment, action

    def on_step_end(self, args, state, control, **_):
        if self._moment == "step":
            self._action(state.global_step)

    def on_save(self, args, state, control, **_):
        if self._moment == "save":
            self._action(state.global_step)


class Killed(BaseException):
    """Ends a run as a kill would."""


def kill_at(moment, step):
    def kill(now):
        if now == step:
            raise Killed

    return At(moment, kill)


def train_until_killed(trainer):
    with pytest.raises(Killed):
        trainer.train()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happens to."""
    trainer = make_trainer(tmp_path_factory.mktemp("whole"))
    trainer.train()
    return end_of(trainer, trainer.rankflow.flow), losses(trainer)


def test_a_checkpoint_has_its_name_once_it_is_whole(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, [At("save", lambda step: seen.append(checkpoints(tmp_path)))])
    save = trainer.save_engine
    trainer.save_engine = lambda folder: (seen.append(checkpoints(tmp_path)), save(folder))
    trainer.train()
    until = [list(range(2, step + 1, 2)) for step in range(0, STEPS + 1, 2)]
    assert seen == [steps for pair in pairwise(until) for steps in pair]
    assert all(find_damage(path) is None for path in tmp_path.glob("checkpoint-*"))


def test_older_checkpoints_go_once_the_new_one_is_whole(tmp_path):
    seen = []
    trainer = make_trainer(tmp_path, save_total_limit=1)
    save = trainer.save_engine
    trainer.save_engine = lambda folder: (seen.append(checkpoints(tmp_path)), save(folder))
    trainer.train()
    assert seen == [[], [2], [4], [6], [8], [10]]
    assert checkpoints(tmp_path) == [12]


@pytest.mark.parametrize("step", [1, 4, 5, 9])
def test_a_killed_run_resumes_with_the_same_bits_and_logs_the_same_losses(step, whole, tmp_path):
    train_until_killed(make_trainer(tmp_path, [kill_at("step", step + 1)], save_steps=step))
    trainer = make_trainer(tmp_path, save_steps=step)
    trainer.train(resume_from_checkpoint=True)
    assert (end_of(trainer, trainer.rankflow.flow), losses(trainer)) == whole


def test_the_mean_loss_is_that_of_the_steps_since_the_resume(tmp_path):
    make_trainer(tmp_path, save_steps=8, logging_steps=1).train()
    trainer = make_trainer(tmp_path / "other", save_steps=8, logging_steps=1)
    output = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    since = [entry["loss"] for entry in losses(trainer) if entry["step"] > 8]
    assert output.training_loss == pytest.approx(sum(since) / 4, rel=1e-5)


def test_a_run_that_was_killed_after_its_last_step_takes_none_too_many(whole, tmp_path):
    train_until_killed(make_trainer(tmp_path, [kill_at("save", STEPS)]))
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == STEPS
    assert (end_of(trainer, trainer.rankflow.flow), losses(trainer)) == whole


def test_the_newest_checkpoint_that_verifies_is_resumed_and_what_is_skipped_is_told(
    tmp_path, caplog, whole
):
    train_until_killed(make_trainer(tmp_path, [kill_at("step", 9)]))
    (tmp_path / "checkpoint-8" / "optimizer.pt").unlink()
    os.truncate(tmp_path / "checkpoint-6" / "rng_state.pth", 100)
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-8: optimizer.pt cannot be read (No such file or directory)" in caplog.text
    assert "checkpoint-6: rng_state.pth is not what was written (100 bytes)" in caplog.text
    assert "checkpoint-4" not in caplog.text
    assert end_of(trainer, trainer.rankflow.flow) == whole[0]


def test_without_a_checkpoint_there_is_nothing_to_resume(tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint that a run can go on from; begin"):
        make_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_another_number_of_processes_is_resumed_with_a_warning(tmp_path, caplog):
    train_until_killed(make_trainer(tmp_path, [kill_at("step", 5)]))
    checkpoint = tmp_path / "checkpoint-4"
    for number in (0, 1):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{number}.pth")
    seal(checkpoint)
    make_trainer(tmp_path).train(resume_from_checkpoint=True)
    assert "was written by a job of 2 processes and this one has 1" in caplog.text


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tmp_path):
    make_trainer(tmp_path, save_only_model=True).train()
    with pytest.raises(CheckpointError, match=r"resumed from: optimizer.pt is missing; name ano"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path):
    def damage(step):
        file = tmp_path / f"checkpoint-{step}" / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-1] + b"\x01")

    trainer = make_trainer(tmp_path, [At("save", damage)], **BEST)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: adapter_model.safetensors is no"):
        trainer.train()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_told_and_leaves_the_older_checkpoint(error, tmp_path, whole):
    trainer = make_trainer(tmp_path)
    save = trainer.save_engine

    def save_engine(folder):
        if trainer.state.global_step == 6:
            raise error
        save(folder)

    trainer.save_engine = save_engine
    told = r"checkpoint-6 could not be written \(.*\); \S*checkpoint-4 is whole: free some space"
    with pytest.raises(CheckpointError, match=told):
        trainer.train()
    assert checkpoints(tmp_path) == [2, 4]
    assert list(tmp_path.glob(".*")) == []
    trainer = make_trainer(tmp_path)
    trainer.train(resume_from_checkpoint=True)
    assert end_of(trainer, trainer.rankflow.flow) == whole[0]


def test_another_error_while_saving_stays_what_it_is(tmp_path):
    trainer = make_trainer(tmp_path)

    def save_engine(folder):
        raise ValueError("a defect")

    trainer.save_engine = save_engine
    with pytest.raises(ValueError, match="a defect"):
        trainer.train()
    assert checkpoints(tmp_path) == []


def hold(folder, held, may_go):
    with claim(folder):
        held.set()
        may_go.wait()


@pytest.mark.parametrize("host", ["RankFlowTrainer", "Trainer"])
def test_a_second_writer_to_a_folder_is_refused(host, tmp_path):
    context = multiprocessing.get_context("fork")
    held, may_go = context.Event(), context.Event()
    folder = tmp_path / "run"
    process = context.Process(target=hold, args=(folder, held, may_go))
    process.start()
    held.wait()
    make = {"RankFlowTrainer": make_trainer, "Trainer": lambda f: make_plain(f)[0]}[host]
    with pytest.raises(RankFlowError, match="is being written by another process"):
        make(folder).train()
    assert not folder.exists() or list(folder.iterdir()) == []
    may_go.set()
    process.join()
    make(folder).train()


@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_plain_trainer_resumes_with_the_same_bits(step, tmp_path):
    whole, callback = make_plain(tmp_path / "whole", logging_steps=1)
    whole.train()
    expected = end_of(whole, callback.flow)
    first, _ = make_plain(tmp_path / "run", [kill_at("step", step + 1)], logging_steps=1)
    train_until_killed(first)
    trainer, callback = make_plain(tmp_path / "run", logging_steps=1)
    path = callback.resume(trainer)
    assert path == str(tmp_path / "run" / f"checkpoint-{step}")
    trainer.train(resume_from_checkpoint=path)
    assert end_of(trainer, callback.flow) == expected
    since = [entry for entry in losses(whole) if entry["step"] > step]
    assert losses(trainer)[-len(since) :] == since


def test_what_a_plain_trainer_was_killed_in_the_middle_of_is_skipped(tmp_path, caplog):
    first, callback = make_plain(tmp_path)
    callback.on_save = kill_at_save(callback.on_save, 6)
    train_until_killed(first)
    assert checkpoints(tmp_path) == [2, 4, 6]
    trainer, callback = make_plain(tmp_path)
    assert Path(callback.resume(trainer)).name == "checkpoint-4"
    assert "skipped" in caplog.text


def kill_at_save(save, step):
    def on_save(args, state, control, **more):
        if state.global_step == step:
            raise Killed
        save(args, state, control, **more)

    return on_save


def test_the_end_of_a_run_is_not_resumed_by_a_plain_trainer(tmp_path):
    make_plain(tmp_path)[0].train()
    trainer, callback = make_plain(tmp_path)
    with pytest.raises(CheckpointError, match=r"of the last of 12 steps, so nothing is left"):
        callback.resume(trainer)
    with pytest.raises(CheckpointError, match=r"there is no such folder; name another"):
        callback.resume(trainer, tmp_path / "nowhere")


def test_a_full_disk_under_a_plain_trainer_is_told(tmp_path, monkeypatch):
    def save_state(state, folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("rankflow.integrations.huggingface.save_state", save_state)
    trainer, _ = make_plain(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 could not be .*there is no older"):
        trainer.train()
    assert find_checkpoint(tmp_path).path is None


def test_tensorboard_forgets_the_events_that_a_resumed_run_repeats(tmp_path):
    settings = {"report_to": "tensorboard"}
    train_until_killed(make_trainer(tmp_path, [kill_at("step", 9)], save_steps=4, **settings))
    stale = tmp_path / "checkpoint-8"
    (stale / "scheduler.pt").unlink()
    trainer = make_trainer(tmp_path, save_steps=4, **settings)
    trainer.train(resume_from_checkpoint=True)
    events = EventAccumulator(str(tmp_path / "rankflow"))
    events.Reload()
    steps = [scalar.step for scalar in events.Scalars("rankflow/spent")]
    assert steps == [event.step for event in trainer.rankflow.flow.history]
    assert len(steps) == len(set(steps)) >= 3


def test_the_state_of_callbacks_is_saved_once_however_often_it_is_saved(tmp_path):
    callbacks = [transformers.EarlyStoppingCallback(3), transformers.EarlyStoppingCallback(5)]
    trainer = make_trainer(tmp_path, callbacks, **BEST)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-12" / "trainer_state.json").read_text())
    states = saved["stateful_callbacks"]["EarlyStoppingCallback"]
    assert [state["args"]["early_stopping_patience"] for state in states] == [3, 5]
