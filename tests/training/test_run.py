import io
import json
import math

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rankflow.errors import BudgetError, DivergenceError, SpecError
from rankflow.export.folder import export_folder
from rankflow.report.events import read_events
from rankflow.specs.run import load_run
from rankflow.training.pooling import pool
from rankflow.training.run import train

RUN = """
name = "trial"
seed = 3

[model]
name = "{model}"
task = "{task}"
{model_keys}

[data]
train = "{rows}"
max_length = 16
{data_keys}

[adapter]
r = 4
use_dora = true

[budget]
rank = 2
start = 1.5
schedule = "cubic"
every = 2

[train]
output_dir = "{folder}"
max_steps = 12
per_device_train_batch_size = 4
learning_rate = 1e-2
save_strategy = "no"
use_cpu = true
"""


@pytest.fixture
def run(tmp_path, write_rows):
    """Write a run file and train it; returns the result and what was printed."""

    def start(model, task, rows, *, model_keys="", data_keys="", overrides=()):
        path = tmp_path / "run.toml"
        path.write_text(
            RUN.format(
                model=model,
                task=task,
                model_keys=model_keys,
                data_keys=data_keys,
                rows=write_rows("rows.jsonl", rows),
                folder=tmp_path / "out",
            )
        )
        console = Console(record=True, width=100, file=io.StringIO())
        result = train(load_run(path, overrides), console=console)
        return result, console.export_text()

    return start


CASES = {
    "mean": ("sequence-classification", 'pooling = "mean"', AutoModelForTokenClassification),
    "model": ("sequence-classification", "", AutoModelForSequenceClassification),
    "words": ("token-classification", "", AutoModelForTokenClassification),
    "causal": ("causal-lm", "", AutoModelForCausalLM),
    "answers": ("causal-lm", "", AutoModelForCausalLM),
    "seq2seq": ("seq2seq-lm", "", AutoModelForSeq2SeqLM),
}


def rows_for(task, sentiment_rows):
    if task == "token-classification":
        return [
            {"text": row["text"].split(), "label": ["O"] * (len(row["text"].split()) - 1) + ["B"]}
            for row in sentiment_rows
        ]
    return [row | {"target": row["text"]} for row in sentiment_rows]


def test_a_run_that_diverges_stops_with_the_cause_and_exports_no_adapter(
    run, sentiment_rows, bert_folder, tmp_path
):
    overrides = ["train.learning_rate=1e36", "train.max_steps=40"]
    with pytest.raises(DivergenceError, match="not finite"):
        run(bert_folder, "sequence-classification", sentiment_rows, overrides=overrides)
    assert not (tmp_path / "out" / "adapter").exists()
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.parametrize("case", CASES)
def test_every_task_trains_within_its_budget_and_exports_for_stock_peft(
    case, run, sentiment_rows, bert_folder, llama_folder, bart_folder
):
    task, keys, host = CASES[case]
    model = {"causal-lm": llama_folder, "seq2seq-lm": bart_folder}.get(task, bert_folder)
    data_keys = 'target = "target"' if case in ("answers", "seq2seq") else ""
    result, _ = run(
        model, task, rows_for(task, sentiment_rows), model_keys=keys, data_keys=data_keys
    )
    assert result.spent <= result.target
    assert result.spent == sum(result.costs.values())
    assert result.events > 0
    assert all(math.isfinite(value) for value in result.metrics.values())
    assert set(result.metrics) == set(result.baseline)
    classes = {"num_labels": result.classes} if result.classes else {}
    loaded = PeftModel.from_pretrained(host.from_pretrained(model, **classes), result.adapter)
    assert count_live(loaded) == result.spent


def test_a_run_with_targets_is_judged_on_its_answers_alone(run, llama_folder):
    rows = [{"text": "bad a film", "target": "good film"}] * 8
    result, printed = run(llama_folder, "causal-lm", rows, data_keys='target = "target"')
    assert "longer texts are cut from the left of their prompts" in " ".join(printed.split())
    base = AutoModelForCausalLM.from_pretrained(llama_folder)
    model = PeftModel.from_pretrained(base, result.adapter).eval()
    ids = AutoTokenizer.from_pretrained(llama_folder)("bad a film")["input_ids"] + [4, 9]
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(1)
    expected = -(scores[-3, 4] + scores[-2, 9]).item() / 2
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["loss"] < result.baseline["loss"] - 0.1


@pytest.mark.parametrize("magnitude", ["never", "budgeted"])
def test_the_end_of_a_run_tells_what_is_trained_and_what_is_stored(
    magnitude, run, sentiment_rows, bert_folder
):
    overrides = ["budget.rank=0.6", f"budget.magnitude={magnitude}"]
    result, printed = run(
        bert_folder, "sequence-classification", sentiment_rows, model_keys='pooling = "mean"',
        overrides=overrides,
    )  # fmt: skip
    base = AutoModelForTokenClassification.from_pretrained(bert_folder, num_labels=2)
    loaded = PeftModel.from_pretrained(base, result.adapter)
    stored = sum(p.numel() for n, p in loaded.named_parameters() if ".lora_" in n)
    assert result.stored == stored
    assert (result.stored > result.spent) is (magnitude == "budgeted")
    told = f"{stored:,} parameters and {result.spent:,} are trained" in " ".join(printed.split())
    assert told is (magnitude == "budgeted")
    metrics = json.loads((result.folder / "metrics.json").read_text())
    assert (metrics["spent"], metrics["stored"]) == (result.spent, stored)


def count_live(model):
    """Count adapter parameters, without the zeros that stand for a site of rank 0."""
    parameters = dict(model.named_parameters())
    dead = {n.split(".lora_A")[0] for n, p in parameters.items() if ".lora_A" in n and not p.any()}
    factors = {f"{site}.lora_{f}.default.weight" for site in dead for f in "AB"}
    return sum(p.numel() for n, p in parameters.items() if ".lora_" in n and n not in factors)


def test_the_exported_adapter_has_the_reported_accuracy(run, sentiment_rows, bert_folder):
    result, _ = run(
        bert_folder, "sequence-classification", sentiment_rows, model_keys='pooling = "mean"',
        data_keys="validation_fraction = 0.4",
    )  # fmt: skip
    base = AutoModelForTokenClassification.from_pretrained(bert_folder, num_labels=2)
    model = PeftModel.from_pretrained(base, result.adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    predicted = []
    for row in sentiment_rows:
        inputs = tokenizer(row["text"], return_tensors="pt")
        with torch.no_grad():
            logits = pool(model(**inputs).logits, inputs["attention_mask"], "mean")
        predicted.append(("no", "yes")[logits.argmax().item()] == row["label"])
    assert result.metrics["accuracy"] == 1.0
    assert all(predicted)


def test_the_folder_tells_the_whole_run(run, sentiment_rows, bert_folder):
    result, _ = run(bert_folder, "sequence-classification", sentiment_rows)
    written = json.loads((result.folder / "metrics.json").read_text())
    assert written["metrics"] == result.metrics
    assert (written["spent"], written["ranks"]) == (result.spent, result.ranks)
    events = read_events(result.folder / "events.jsonl")
    assert len(events) == result.events
    assert events[-1].ranks == result.ranks
    assert json.loads((result.folder / "run.json").read_text())["seed"] == 3
    assert list(result.folder.rglob("events.out.tfevents*"))
    assert f"{result.metrics['nll']:.4f}" in (result.adapter / "README.md").read_text()


def test_the_console_tells_rows_events_metrics_budget_ranks_and_what_to_do_next(
    run, sentiment_rows, bert_folder
):
    result, printed = run(bert_folder, "sequence-classification", sentiment_rows)
    assert "18 train, 2 validation rows, 2 classes" in printed
    assert "0 rows fill all 16, longer texts are cut" in printed
    assert printed.count("step ") >= result.events
    assert f"{result.metrics['accuracy']:.4f}" in printed
    assert f"{result.spent:,} spent of {result.target:,}" in printed
    assert "intermediate" in printed
    assert f"tensorboard --logdir {result.folder}" in printed
    assert f"rankflow inspect {result.folder}" in printed
    assert "AutoModelForSequenceClassification.from_pretrained(" in printed


def test_the_same_spec_gives_the_same_events_and_metrics(run, sentiment_rows, bert_folder):
    first, _ = run(bert_folder, "sequence-classification", sentiment_rows)
    second, printed = run(bert_folder, "sequence-classification", sentiment_rows)
    assert "an earlier run moved to" in printed
    assert first.metrics == second.metrics
    assert first.ranks == second.ranks
    moved = second.folder.with_name("out.1")
    for before, after in zip(
        read_events(moved / "events.jsonl"),
        read_events(second.folder / "events.jsonl"),
        strict=True,
    ):
        assert (before.pruned, before.born) == (after.pruned, after.born)


def test_a_run_resumes_in_its_folder_with_the_events_of_an_unbroken_one(
    run, sentiment_rows, bert_folder
):
    task, saving = "sequence-classification", ("train.save_strategy=steps", "train.save_steps=6")
    whole, _ = run(bert_folder, task, sentiment_rows, overrides=saving)
    resume = f"train.resume_from_checkpoint={whole.folder / 'checkpoint-6'}"
    resumed, printed = run(bert_folder, task, sentiment_rows, overrides=(*saving, resume))
    assert "moved to" not in printed
    assert resumed.folder == whole.folder
    assert resumed.ranks == whole.ranks
    assert resumed.metrics == whole.metrics
    events = read_events(resumed.folder / "events.jsonl")
    assert [event.index for event in events] == list(range(whole.events))


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("data.max_length=99", SpecError, "has 32 positions"),
        ("data.label=lable", SpecError, "did you mean 'label'"),
        ('adapter.target_modules=["nowhere"]', SpecError, "linear modules of"),
        ("budget.rank=99", BudgetError, "out of reach"),
    ],
)
def test_what_is_wrong_is_found_before_the_first_step(
    run, sentiment_rows, bert_folder, tmp_path, override, error, message
):
    with pytest.raises(error, match=message):
        run(bert_folder, "sequence-classification", sentiment_rows, overrides=(override,))
    assert not (tmp_path / "out" / "events.jsonl").exists()


def test_without_held_out_rows_nothing_is_measured(run, sentiment_rows, bert_folder):
    result, printed = run(
        bert_folder, "sequence-classification", sentiment_rows, data_keys="validation_fraction = 0"
    )
    assert (result.split, result.metrics, result.baseline) == (None, {}, {})
    assert "spent of" in printed


def test_micro_batches_make_the_same_step_as_the_whole_batch(run, sentiment_rows, bert_folder):
    fixed = ("budget.schedule=constant", "budget.start=1", "budget.policy=uniform")
    losses = []
    for size, count in ((4, 1), (2, 2)):
        result, _ = run(
            bert_folder,
            "sequence-classification",
            sentiment_rows,
            model_keys='pooling = "mean"',
            overrides=(
                *fixed,
                "train.max_steps=4",
                f"train.per_device_train_batch_size={size}",
                f"train.gradient_accumulation_steps={count}",
            ),
        )
        losses.append(result.metrics["nll"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What was good?"},
    {"role": "assistant", "content": "The film."},
]
MESSAGES, ROOM = 'messages = "messages"', "data.max_length=64"
SHOUTING = "{% for m in messages %}{{ m.role + '! ' + m.content + eos_token }}{% endfor %}"


def test_a_conversation_is_judged_on_the_assistants_turns_alone(run, chat_folder):
    rows = [{"messages": CHAT}] * 8
    result, printed = run(chat_folder, "causal-lm", rows, data_keys=MESSAGES, overrides=[ROOM])
    tokenizer = AutoTokenizer.from_pretrained(chat_folder)
    prompt = tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True, return_dict=False)
    answer = tokenizer("The film.<|im_end|>")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(chat_folder)
    model = PeftModel.from_pretrained(base, result.adapter).eval()
    with torch.no_grad():
        scores = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(1)
    expected = -scores[len(prompt) - 1 : -1][range(len(answer)), answer].mean().item()
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.metrics["loss"] < result.baseline["loss"] - 0.1
    length = len(prompt) + len(answer) + 1  # a line break ends a turn of ChatML
    assert f"{len(answer) / length:.1%} of them are learned" in printed


def test_rows_of_which_nothing_is_left_to_learn_are_dropped_and_told(run, chat_folder):
    long = [CHAT[1] | {"content": "What was good? " * 40}, CHAT[2]]
    rows = [{"messages": CHAT}] * 7 + [{"messages": long}] * 3
    overrides = [ROOM, "data.validation_fraction=0"]
    _, printed = run(chat_folder, "causal-lm", rows, data_keys=MESSAGES, overrides=overrides)
    assert "3 train rows are dropped: what they have to learn begins behind max_length = 64" in (
        " ".join(printed.split())
    )


def test_the_chat_template_of_a_run_is_saved_with_its_adapter_and_its_merged_model(
    run, chat_folder, tmp_path
):
    (tmp_path / "shout.jinja").write_text(SHOUTING)
    overrides = [
        ROOM,
        "model.chat_template=shout.jinja",
        *("train.save_strategy=steps", "train.save_steps=6"),
    ]
    rows = [{"messages": CHAT[:2], "target": CHAT[2:]}] * 8
    keys = f'{MESSAGES}\ntarget = "target"'
    result, _ = run(chat_folder, "causal-lm", rows, data_keys=keys, overrides=overrides)
    copied = export_folder(result.folder, tmp_path / "copied")
    merged = export_folder(copied, tmp_path / "merged", format="merged")
    for folder in (result.adapter, result.folder / "checkpoint-6", copied, merged):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == SHOUTING
        assert tokenizer.padding_side == AutoTokenizer.from_pretrained(chat_folder).padding_side
