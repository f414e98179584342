import copy
import logging
from dataclasses import dataclass, replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import Trainer, TrainerCallback, TrainingArguments

from rankflow.engine import RankFlow
from rankflow.errors import CheckpointError, RankFlowError
from rankflow.integrations.huggingface import RankFlowCallback, RankFlowTrainer
from rankflow.report.events import read_events
from rankflow.specs.budget import BudgetSpec

STEPS = 16
MOVES = {"rank": 1.5, "warmup": 2, "cooldown": 4, "every": 3, "decay": 0.5, "protect": 1}
PRUNE = BudgetSpec(**MOVES, start=2, schedule="linear", recycle=0.2, hysteresis=0.1)
REALLOCATE = BudgetSpec(**MOVES, recycle=0.5, hysteresis=0.1)
GATED = BudgetSpec(**MOVES, recycle=0.5, hysteresis=0.1, components="gated", dem=0.5)
# A magnitude may go and come back, and others find no room at the start.
BUDGETED = BudgetSpec(
    **MOVES | {"rank": 0.8, "protect": 0},
    magnitude="budgeted",
    score="random",
    policy="threshold",
    recycle=0.6,
    hysteresis=0,
)
VERA = BudgetSpec(
    **{key: value for key, value in MOVES.items() if key != "rank"},
    params=420,
    max_rank=6,
    recycle=0.9,
    hysteresis=0.0,
    components="vera",
)
EVENT_STEPS = [2, 5, 8, 11, 12]


def make_base(dropout=0.1):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def make_model(*, dropout=0.1, adapter_name="default", **config):
    config = {
        "r": 4,
        "lora_alpha": 6,
        "target_modules": ["query", "value", "dense"],
        "task_type": "SEQ_CLS",
    } | config
    return peft.get_peft_model(make_base(dropout), peft.LoraConfig(**config), adapter_name)


def make_data(rows=24):
    tokens = torch.randint(1, 13, (rows, 6), generator=torch.Generator().manual_seed(2))
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3}
        for row in tokens
    ]


def make_arguments(folder, **changes):
    settings = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.02,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    return TrainingArguments(**settings | changes)


class Spy(TrainerCallback):
    """Notes what the model is after every step and at every checkpoint."""

    def __init__(self):
        self.logits = {}
        self.parameters = []

    def on_step_end(self, args, state, control, *, model, **_):
        self.parameters.append(copy.deepcopy(adapter_parameters(model)))

    def on_save(self, args, state, control, *, model, **_):
        self.logits[f"checkpoint-{state.global_step}"] = logits_of(model)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def make_trainer(host, folder, budget=PRUNE, *, model=None, callbacks=(), settings=None, **more):
    """Build a plain Trainer with the callback, or a RankFlowTrainer; return it with a callback."""
    arguments = {
        "model": make_model() if model is None else model,
        "args": make_arguments(folder, **(settings or {})),
        "train_dataset": make_data(),
    } | more
    if host == "RankFlowTrainer":
        trainer = RankFlowTrainer(**arguments, budget=budget, callbacks=list(callbacks))
        return trainer, trainer.rankflow
    callback = RankFlowCallback(budget)
    return Trainer(**arguments, callbacks=[callback, *callbacks]), callback


def adapter_parameters(model):
    return {n: p for n, p in model.named_parameters() if ".lora_" in n and p.requires_grad}


def recount(model):
    return sum(p.numel() for p in adapter_parameters(model).values())


@torch.no_grad()
def logits_of(model):
    was_training = model.training
    model.eval()
    rows = make_data()[:5]
    inputs = {key: torch.stack([row[key] for row in rows]) for key in rows[0] if key != "labels"}
    logits = model(**inputs).logits
    model.train(was_training)
    return logits


def untimed(history):
    return [replace(event, seconds=0.0) for event in history]


@pytest.fixture(params=["Trainer", "RankFlowTrainer"])
def host(request):
    return request.param


@pytest.mark.parametrize("budget", [PRUNE, REALLOCATE], ids=["prune", "reallocate"])
def test_training_ends_within_the_budget(host, budget, tmp_path, use_dora):
    model = make_model(use_dora=use_dora)
    trainer, callback = make_trainer(host, tmp_path, budget, model=model)
    trainer.train()
    flow = callback.flow
    target = int(1.5 * sum(site.component_cost for site in flow.resolved.sites))
    assert flow.steps == STEPS
    assert flow.spent == recount(model) <= flow.limit == target
    assert [event.step for event in flow.history] == EVENT_STEPS
    assert any(event.born for event in flow.history)
    assert any(event.pruned for event in flow.history)


def test_the_event_log_holds_the_history(host, tmp_path):
    trainer, callback = make_trainer(host, tmp_path)
    trainer.train()
    assert read_events(tmp_path / "events.jsonl") == callback.flow.history


def test_the_learning_rate_decays_and_every_site_moves_across_the_events(host, tmp_path):
    spy = Spy()
    trainer, callback = make_trainer(host, tmp_path, REALLOCATE, callbacks=[spy])
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "loss" in entry]
    expected = [0.02 * (1 - step / STEPS) for step in range(STEPS)]
    assert rates == pytest.approx(expected)
    assert len(spy.parameters) == STEPS
    for event in callback.flow.history:
        before, after = spy.parameters[event.step - 1], spy.parameters[event.step + 1]
        alive = [name for name, parameter in before.items() if parameter.numel()]
        assert alive
        assert all(not torch.equal(before[name], after[name]) for name in alive)


def test_accumulated_and_clipped_gradients_decide_like_the_whole_batch(host, tmp_path):
    runs = []
    for parts in (1, 2):
        settings = {
            "per_device_train_batch_size": 4 // parts,
            "gradient_accumulation_steps": parts,
            "max_grad_norm": 0.05,
        }
        trainer, callback = make_trainer(
            host, tmp_path / str(parts), model=make_model(dropout=0.0), settings=settings
        )
        trainer.train()
        assert trainer.state.global_step == callback.flow.steps == STEPS
        assert callback.flow.spent == recount(trainer.model) <= callback.flow.limit
        runs.append(callback.flow.history)
    assert [event.ranks for event in runs[0]] == [event.ranks for event in runs[1]]


def test_gated_components_train_under_any_trainer(host, tmp_path, use_dora):
    spy = Spy()
    model = make_model(use_dora=use_dora)
    trainer, callback = make_trainer(host, tmp_path, GATED, model=model, callbacks=[spy])
    trainer.train()
    assert callback.flow.spent == recount(model) <= callback.flow.limit
    gates = {name: p for name, p in spy.parameters[0].items() if "lora_gate" in name}
    assert len(gates) == len(callback.flow.ranks)
    # the very first step moved them
    assert all(gate.all() for gate in gates.values())
    assert any(gate.numel() for gate in gates.values())


def test_the_regulariser_acts_once_a_step_however_gradients_are_accumulated(host, tmp_path):
    finals = []
    for parts, weight in ((1, 500.0), (2, 500.0), (1, 0.0)):
        spy = Spy()
        trainer, _ = make_trainer(
            host,
            tmp_path / f"{parts} {weight}",
            GATED.model_copy(update={"dem": weight}),
            model=make_model(dropout=0.0),
            callbacks=[spy],
            settings={
                "per_device_train_batch_size": 4 // parts,
                "gradient_accumulation_steps": parts,
                "max_grad_norm": 0.0,
                "optim": "sgd",
                "max_steps": 8,
            },
        )
        trainer.train()
        first = spy.parameters[0]  # gates were 0, so nothing else has moved A and B
        finals.append({name: p for name, p in first.items() if "lora_gate" not in name})
    once, accumulated, without = finals
    for name, parameter in once.items():
        torch.testing.assert_close(accumulated[name], parameter, rtol=1e-5, atol=1e-7)
        assert (parameter - without[name]).abs().max() > 1e-3


def test_bf16_training_ends_within_the_budget(host, tmp_path):
    trainer, callback = make_trainer(host, tmp_path, settings={"bf16": True})
    trainer.train()
    assert callback.flow.spent == recount(trainer.model) <= callback.flow.limit
    assert len(callback.flow.history) == len(EVENT_STEPS)


def test_every_checkpoint_loads_in_stock_peft_with_the_same_outputs(host, tmp_path, use_dora):
    spy = Spy()
    trainer, callback = make_trainer(
        host,
        tmp_path,
        BudgetSpec(**MOVES | {"rank": 0.8}, start=3, schedule="linear"),
        model=make_model(use_dora=use_dora),
        callbacks=[spy],
        settings={"save_strategy": "steps", "save_steps": 3},
    )
    trainer.train()
    assert len(spy.logits) == 6
    assert len({tuple(event.ranks.values()) for event in callback.flow.history}) > 2
    for name, live in spy.logits.items():
        stock = peft.PeftModel.from_pretrained(make_base(), tmp_path / name)
        assert (logits_of(stock) - live).abs().max() <= 1e-5


@dataclass(frozen=True)
class WholeRun:
    """A run that was never interrupted, with a checkpoint at every step."""

    use_dora: bool
    budget: BudgetSpec
    folder: Path
    model: peft.PeftModel
    flow: RankFlow


def run_whole(folder, budget, *, use_dora):
    trainer, callback = make_trainer(
        "RankFlowTrainer",
        folder,
        budget,
        model=make_model(use_dora=use_dora),
        settings={"save_strategy": "steps", "save_steps": 1},
    )
    trainer.train()
    return WholeRun(use_dora, budget, folder, trainer.model, callback.flow)


@pytest.fixture(scope="module")
def pruned_lora(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), PRUNE, use_dora=False)


@pytest.fixture(scope="module")
def reallocated_dora(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), REALLOCATE, use_dora=True)


@pytest.fixture(scope="module")
def gated_lora(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), GATED, use_dora=False)


@pytest.fixture(scope="module")
def gated_dora(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), GATED, use_dora=True)


@pytest.fixture(scope="module")
def budgeted_dora(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), BUDGETED, use_dora=True)


@pytest.fixture(scope="module")
def moving_dvora(tmp_path_factory):
    return run_whole(tmp_path_factory.mktemp("whole"), VERA, use_dora=True)


def resume(run, folder, checkpoint, *, budget=None, **changes):
    trainer, callback = make_trainer(
        "RankFlowTrainer",
        folder,
        run.budget if budget is None else budget,
        model=make_model(use_dora=run.use_dora),
        **changes,
    )
    trainer.train(resume_from_checkpoint=str(run.folder / f"checkpoint-{checkpoint}"))
    return trainer, callback.flow


@pytest.mark.parametrize("checkpoint", [1, 2, 3, 5, 9, 12, 15])
@pytest.mark.parametrize(
    "run",
    [
        "pruned_lora",
        "reallocated_dora",
        "gated_lora",
        "gated_dora",
        "budgeted_dora",
        "moving_dvora",
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(run, checkpoint, tmp_path, request):
    whole = request.getfixturevalue(run)
    trainer, flow = resume(whole, tmp_path, checkpoint)
    assert untimed(flow.history) == untimed(whole.flow.history)
    expected, actual = adapter_parameters(whole.model), adapter_parameters(trainer.model)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_budgeted_magnitudes_move_and_every_checkpoint_loads_in_stock_peft(budgeted_dora):
    flow = budgeted_dora.flow
    changes = [c for event in flow.history for c in event.pruned + event.born]
    assert any(change.component is None for change in changes)
    last = flow.history[-1]
    assert {True, False} == set(last.magnitudes.values())
    assert last.spent == flow.spent == recount(budgeted_dora.model) <= flow.limit
    assert read_events(budgeted_dora.folder / "events.jsonl") == flow.history
    folder = budgeted_dora.folder / f"checkpoint-{STEPS}"
    stock = peft.PeftModel.from_pretrained(make_base(), folder)
    assert (logits_of(stock) - logits_of(budgeted_dora.model)).abs().max() <= 1e-5


@pytest.mark.parametrize("magnitude", ["never", "budgeted"])
def test_a_run_whose_magnitudes_are_all_off_saves_plain_lora_and_resumes(magnitude, tmp_path):
    budget = BudgetSpec(
        **MOVES | {"rank": 1},
        magnitude=magnitude,
        policy="frozen",
        ranks={".*": 1} | ({".*magnitude": 0} if magnitude == "budgeted" else {}),
    )
    whole = run_whole(tmp_path / "whole", budget, use_dora=True)
    trainer, flow = resume(whole, tmp_path / "resumed", 5)
    assert flow.spent == recount(trainer.model) == flow.limit
    expected, actual = adapter_parameters(whole.model), adapter_parameters(trainer.model)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    stock = peft.PeftModel.from_pretrained(make_base(), whole.folder / "checkpoint-5")
    assert stock.peft_config["default"].use_dora is False
    assert not any("magnitude" in name for name, _ in stock.named_parameters())


def test_a_resumed_run_logs_the_whole_history_once(pruned_lora, tmp_path):
    make_trainer("RankFlowTrainer", tmp_path)[0].train()
    _, flow = resume(pruned_lora, tmp_path, 6)
    assert len(flow.history) == len(EVENT_STEPS)
    assert read_events(tmp_path / "events.jsonl") == flow.history


def test_resuming_for_another_number_of_steps_is_refused(pruned_lora, tmp_path):
    with pytest.raises(CheckpointError, match="planned for 16 steps and this one takes 20"):
        resume(pruned_lora, tmp_path, 6, settings={"max_steps": 20})


def test_resuming_under_another_budget_is_refused(pruned_lora, tmp_path):
    with pytest.raises(CheckpointError, match="other budget than this run"):
        resume(pruned_lora, tmp_path, 6, budget=REALLOCATE)


def test_resuming_from_a_checkpoint_of_a_stock_trainer_is_refused(pruned_lora, tmp_path):
    Trainer(
        model=make_model(),
        args=make_arguments(tmp_path, max_steps=2, save_strategy="steps", save_steps=1),
        train_dataset=make_data(),
    ).train()
    with pytest.raises(CheckpointError, match="or RankFlow did not do it; name another"):
        resume(replace(pruned_lora, folder=tmp_path), tmp_path, 1)


def test_a_plain_trainer_refuses_to_resume_where_the_ranks_have_moved(pruned_lora, tmp_path):
    trainer, _ = make_trainer("Trainer", tmp_path)
    with pytest.raises(CheckpointError, match="this Trainer cannot follow; resume with RankFlowT"):
        trainer.train(resume_from_checkpoint=str(pruned_lora.folder / "checkpoint-6"))


def test_a_plain_trainer_refuses_to_resume_even_at_the_same_ranks(tmp_path):
    budget = BudgetSpec(rank=4, policy="uniform")  # the ranks that the adapter was made with
    settings = {"save_strategy": "steps", "save_steps": 6}
    make_trainer("Trainer", tmp_path, budget, settings=settings)[0].train()
    trainer, _ = make_trainer("Trainer", tmp_path, budget)
    with pytest.raises(CheckpointError, match=r"resumed at step 6, .*resume with RankFlowTrainer"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_the_guard_on_loading_ends_when_training_begins(tmp_path):
    trainer, _ = make_trainer("Trainer", tmp_path)
    model = trainer.model
    assert len(model._load_state_dict_pre_hooks) == 1
    trainer.train()
    assert len(model._load_state_dict_pre_hooks) == 0


def test_training_twice_with_one_trainer_is_refused_and_leaves_the_model_alone(host, tmp_path):
    trainer, callback = make_trainer(host, tmp_path)
    trainer.train()
    ranks, before = callback.flow.ranks, copy.deepcopy(adapter_parameters(trainer.model))
    with pytest.raises(RankFlowError, match=r"has taken steps before.*make a new Trainer"):
        trainer.train()
    assert callback.flow.ranks == ranks
    after = adapter_parameters(trainer.model)
    assert all(torch.equal(after[name], before[name]) for name in before)


BEST = {
    "save_strategy": "steps",
    "save_steps": 3,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "load_best_model_at_end": True,
    "metric_for_best_model": "score",
}


def score_best_at(evaluation):
    """Make a metric that is greatest at the evaluation of that number."""
    scores = iter([float(i == evaluation) for i in range(6)])
    return lambda prediction: {"score": next(scores)}


@pytest.mark.parametrize(
    "settings", [{}, {"components": "gated"}, {"magnitude": "budgeted"}], ids=str
)
@pytest.mark.parametrize(("evaluation", "step"), [(2, 9), (3, 12)])
def test_the_best_model_is_restored_across_resizes_where_it_meets_the_budget(
    evaluation, step, settings, tmp_path, use_dora
):
    spy = Spy()
    if settings.get("magnitude") == "budgeted" and not use_dora:
        settings = {}
    moves = MOVES | {"cooldown": 1, "every": 1, "grow": "orthogonal"} | settings
    budget = BudgetSpec(**moves, recycle=0.9, hysteresis=0)
    trainer, callback = make_trainer(
        "RankFlowTrainer",
        tmp_path,
        budget,
        model=make_model(use_dora=use_dora),
        callbacks=[spy],
        settings=BEST,
        eval_dataset=make_data(),
        compute_metrics=score_best_at(evaluation),
    )
    trainer.train()
    flow = callback.flow
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{step}")
    assert torch.equal(logits_of(trainer.model), spy.logits[f"checkpoint-{step}"])
    assert flow.spent == recount(trainer.model) <= flow.limit
    assert flow.ranks == next(e.ranks for e in flow.history if e.step == step)
    assert flow.ranks != flow.history[-1].ranks


def test_a_best_model_from_above_the_budget_is_made_to_meet_it(tmp_path, caplog):
    trainer, callback = make_trainer(
        "RankFlowTrainer",
        tmp_path,
        settings=BEST,
        eval_dataset=make_data(),
        compute_metrics=score_best_at(0),
    )
    trainer.train()
    flow = callback.flow
    assert flow.steps == 3
    assert flow.spent == recount(trainer.model) <= flow.limit == flow.resolved.target
    assert [event.step for event in flow.history] == [*EVENT_STEPS, 3]
    assert read_events(tmp_path / "events.jsonl") == flow.history
    assert "after 3 of 16 steps the model was above its budget" in caplog.text


def test_a_plain_trainer_refuses_to_load_the_best_model_before_it_trains(tmp_path):
    spy = Spy()
    trainer, _ = make_trainer(
        "Trainer",
        tmp_path,
        callbacks=[spy],
        settings=BEST,
        eval_dataset=make_data(),
        compute_metrics=score_best_at(0),
    )
    with pytest.raises(RankFlowError, match=r"load_best_model_at_end=True .*use RankFlowTrainer"):
        trainer.train()
    assert spy.parameters == []


@pytest.mark.parametrize("step", [1, 6])
def test_an_early_stop_meets_the_budget_and_says_so(host, step, tmp_path, caplog):
    trainer, callback = make_trainer(host, tmp_path, callbacks=[StopAt(step)])
    with caplog.at_level(logging.WARNING, logger="rankflow"):
        trainer.train()
    flow = callback.flow
    assert trainer.state.global_step == flow.steps == step
    assert flow.spent == recount(trainer.model) <= flow.limit == flow.resolved.target
    (record,) = [r for r in caplog.records if r.name.startswith("rankflow")]
    pruned = len(flow.history[-1].pruned)
    assert f"after {step} of {STEPS} steps the model was above its budget" in record.getMessage()
    assert f"{pruned} components were pruned to meet its {flow.limit} p" in record.getMessage()
    assert read_events(tmp_path / "events.jsonl") == flow.history


def test_a_run_to_its_end_warns_of_nothing(host, tmp_path, caplog):
    trainer, _ = make_trainer(host, tmp_path)
    trainer.train()
    assert [r for r in caplog.records if r.name.startswith("rankflow")] == []


def test_events_go_to_tensorboard_where_the_trainer_reports_to_it(host, tmp_path):
    trainer, callback = make_trainer(host, tmp_path, settings={"report_to": "tensorboard"})
    trainer.train()
    events = EventAccumulator(str(tmp_path / "rankflow"))
    events.Reload()
    spent = [(e.step, e.value) for e in events.Scalars("rankflow/spent")]
    assert spent == [(event.step, event.spent) for event in callback.flow.history]
    assert len(events.Tags()["images"]) == 2 * len(EVENT_STEPS)
    assert read_events(tmp_path / "events.jsonl") == callback.flow.history


def test_without_a_report_nothing_is_written_for_tensorboard(host, tmp_path):
    make_trainer(host, tmp_path)[0].train()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["events.jsonl"]


def test_sinks_of_ones_own_take_the_place_of_the_files(tmp_path):
    seen = []
    callback = RankFlowCallback(PRUNE, sinks=[seen.append])
    Trainer(
        model=make_model(),
        args=make_arguments(tmp_path / "out"),
        train_dataset=make_data(),
        callbacks=[callback],
    ).train()
    assert seen == callback.flow.history
    assert len(seen) == len(EVENT_STEPS)
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_a_callback_added_later_steers_the_adapter_that_it_names(tmp_path):
    model = make_model(adapter_name="steered")
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"]))
    trainer = Trainer(model=model, args=make_arguments(tmp_path), train_dataset=make_data())
    callback = RankFlowCallback(PRUNE, "steered")
    trainer.add_callback(callback)
    trainer.train()
    assert len(callback.flow.history) == len(EVENT_STEPS)
    assert callback.flow.spent == recount(model) <= callback.flow.limit
    assert model.peft_config["other"].r == 2


def test_a_run_of_epochs_plans_for_all_of_its_steps(tmp_path):
    settings = {"max_steps": -1, "num_train_epochs": 3}
    trainer, callback = make_trainer("Trainer", tmp_path, settings=settings)
    trainer.train()
    assert callback.flow.total_steps == callback.flow.steps == 18
    assert callback.flow.history[-1].step == 14


def test_a_callback_that_never_saw_training_begin_is_refused(tmp_path):
    callback = RankFlowCallback(PRUNE)
    with pytest.raises(RankFlowError, match=r"without RankFlowCallback.on_train_begin"):
        callback.on_train_end(make_arguments(tmp_path), None, None)


def test_a_model_without_an_adapter_is_refused_when_training_begins(tmp_path):
    trainer = Trainer(
        model=make_base(),
        args=make_arguments(tmp_path),
        train_dataset=make_data(),
        callbacks=[RankFlowCallback(PRUNE)],
    )
    with pytest.raises(RankFlowError, match=r"steers a peft.PeftModel, received BertFor"):
        trainer.train()


def test_the_hooks_are_gone_when_training_ends(host, tmp_path):
    trainer, _ = make_trainer(host, tmp_path)
    trainer.train()
    for parameter in adapter_parameters(trainer.model).values():
        assert not parameter._post_accumulate_grad_hooks
