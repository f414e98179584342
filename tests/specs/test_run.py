import json
import tomllib
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import TrainingArguments

from rankflow.errors import SpecError
from rankflow.specs.budget import load_budget
from rankflow.specs.run import DataSpec, RunSpec, load_run

ROOT = Path(__file__).parents[2]

CLASSIFIER = """
[model]
name = "minilm"
task = "sequence-classification"
[data]
name = "docstrings"
[budget]
preset = "adalora"
rank = 4
"""
SEQ2SEQ = """
[model]
name = "someone/a-model"
task = "seq2seq-lm"
revision = "main"
[data]
train = ["a.jsonl", "more/b.csv"]
validation = "more/held.jsonl"
target = "answer"
[budget]
params = 1000
"""


@pytest.fixture
def write(tmp_path):
    """Write a run file beside the data files a.jsonl, more/b.csv and more/held.jsonl."""
    (tmp_path / "more").mkdir()
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "more" / "b.csv").write_text("text\nx\n")
    (tmp_path / "more" / "held.jsonl").write_text("")

    def write_run(text, name="try.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_run


def faults_of(path, *overrides):
    """The refusal as pairs: what was received, what must hold."""
    with pytest.raises(SpecError) as caught:
        load_run(path, overrides)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    return dict(zip(lines[::2], lines[1::2], strict=True))


def test_a_run_fills_in_what_is_not_written(write):
    run = load_run(write(CLASSIFIER))
    assert (run.name, run.seed) == ("try", 0)
    assert (run.model.pooling, run.model.dtype, run.model.revision) == ("model", "float32", None)
    assert run.model.attention is None
    assert run.data == DataSpec(name="docstrings")
    assert run.adapter == {"target_modules": "all-linear"}
    assert run.budget == load_budget("adalora", rank=4)
    assert run.train == {"output_dir": "runs/try", "seed": 0}


def test_the_tables_of_others_are_passed_on_as_written(write):
    run = load_run(
        write(
            CLASSIFIER
            + """
            [adapter]
            r = 6
            use_dora = true
            target_modules = ["query", "value"]
            init_lora_weights = "pissa_niter_16"
            [train]
            learning_rate = 1e-3
            max_steps = 30
            lr_scheduler_type = "cosine"
            output_dir = "elsewhere"
            """
        )
    )
    assert LoraConfig(**run.adapter).target_modules == {"query", "value"}
    assert run.train == {
        "output_dir": "elsewhere",
        "seed": 0,
        "learning_rate": 0.001,
        "max_steps": 30,
        "lr_scheduler_type": "cosine",
    }
    assert TrainingArguments(**run.train).max_steps == 30


def test_name_and_seed_reach_every_table(write):
    run = load_run(write('name = "mine"\nseed = 7\n' + CLASSIFIER))
    assert run.train == {"output_dir": "runs/mine", "seed": 7}
    assert run.budget.seed == 7


def test_a_seed_of_the_budget_is_its_own(write):
    assert load_run(write("seed = 7\n" + CLASSIFIER + "seed = 3")).budget.seed == 3


def test_a_budget_needs_no_preset(write):
    assert load_run(write(SEQ2SEQ)).budget.target == ("params", 1000)


def test_paths_start_at_the_folder_of_the_run_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    (tmp_path / "base").mkdir()
    write("rank = 2\nscore = 'fisher'", "mine.toml")
    path = write(SEQ2SEQ.replace("params = 1000", 'preset = "mine.toml"'))
    run = load_run(path, ["model.name=base", 'model={name="base", task="seq2seq-lm"}'])
    assert run.data.train == (tmp_path / "a.jsonl", tmp_path / "more" / "b.csv")
    assert run.data.validation == (tmp_path / "more" / "held.jsonl",)
    assert run.budget.score == "fisher"
    assert run.model.name == str(tmp_path / "base")


CHAT = """
[model]
name = "someone/a-model"
task = "causal-lm"
chat_template = "chat.jinja"
[data]
train = "a.jsonl"
messages = "messages"
[budget]
rank = 2
"""


def test_a_run_may_learn_from_messages_by_a_template_of_its_own(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    write("{{ messages }}", "chat.jinja")
    run = load_run(write(CHAT), ["data.target=completion", "data.loss_on=all"])
    assert (run.data.messages, run.data.target, run.data.loss_on) == (
        "messages",
        "completion",
        "all",
    )
    assert run.model.chat_template == tmp_path / "chat.jinja"
    assert json.loads(run.model_dump_json())["model"]["chat_template"].endswith("chat.jinja")
    assert load_run(write(CHAT)).data.loss_on == "assistant"


# Faults of overrides on a sound run with messages; its template is there.
CHAT_FAULTS = {
    ("data.text=prompt",): {
        'data.text = "prompt", data.messages = "messages"': (
            "a row is a text or a conversation; keep one of these"
        )
    },
    ("model.task=seq2seq-lm", "data.target=y"): {
        'data.messages = "messages", model.task = "seq2seq-lm"': (
            "seq2seq-lm reads no such column; remove it"
        )
    },
    ("data.loss_on=assistants",): {
        'data.loss_on = "assistants"': ("must be 'assistant' or 'all'; did you mean 'assistant'?")
    },
    ('data={name="docstrings", messages="m"}',): {
        'data.name = "docstrings", data.messages = "m"': (
            "it has no conversations; remove messages, or name files"
        )
    },
    ('data={train="a.jsonl", loss_on="all"}',): {
        'data.loss_on = "all"': "only messages have turns; set messages too",
        'model.chat_template = "chat.jinja", data.messages': (
            "the template is for messages; set data.messages, or remove it"
        ),
    },
    ("model.chat_template=3",): {
        "model.chat_template = 3": "must be a file with a chat template (Jinja)"
    },
}


@pytest.mark.parametrize("overrides", CHAT_FAULTS)
def test_what_contradicts_messages_is_refused_with_its_remedy(overrides, write):
    write("{{ messages }}", "chat.jinja")
    assert faults_of(write(CHAT), *overrides) == CHAT_FAULTS[overrides]


def test_a_template_that_is_not_there_is_named(write, tmp_path):
    path = f"{tmp_path}/chat.jinja"
    assert faults_of(write(CHAT)) == {
        f'model.chat_template = "{path}"': f"no such file: {path}; name a file with a chat template"
    }


def test_a_folder_named_like_the_built_in_model_does_not_hide_it(write, tmp_path):
    (tmp_path / "minilm").mkdir()
    assert load_run(write(CLASSIFIER)).model.name == "minilm"


def test_a_resolved_run_is_plain_json(write):
    run = load_run(write(SEQ2SEQ))
    assert json.loads(run.model_dump_json())["data"]["target"] == "answer"


def test_overrides_win_and_a_target_or_source_replaces_the_other(write):
    run = load_run(
        write(CLASSIFIER),
        ["budget.params=2_000", "data.train=a.jsonl", "train.max_steps=3", "seed=5", "name=other"],
    )
    assert run.budget.target == ("params", 2000)
    assert (run.data.name, len(run.data.train)) == (None, 1)
    assert run.train == {"output_dir": "runs/other", "seed": 5, "max_steps": 3}


FAULTY = """
nme = "q"
seed = "x"
[model]
nam = "minilm"
task = "seq2seq-lm"
[data]
train = "none.jsonl"
label = "y"
max_lenght = 3
[adapter]
r = "6"
use_dorra = true
task_type = "CAUSAL_LM"
bias = "non"
[budget]
prest = "fixed"
preset = "adalra"
rank = -4
[train]
max_steps = 300.5
learning_rat = 1e-3
eval_strategy = "stepss"
seed = 3
[modl]
"""


def test_all_faults_of_all_tables_are_reported_at_once(write, tmp_path):
    faults = faults_of(write(FAULTY), "budget.rank", "=3")
    presets = "The presets are adalora, dynamic-rank-dora, fixed, hybrid, prune, reallocate"
    assert faults == {
        'override = "budget.rank"': "must read as in budget.rank=2",
        'override = "=3"': "must read as in budget.rank=2",
        'seed = "x"': "must be a valid integer",
        'nme = "q"': "unknown key; did you mean 'name'?",
        "modl = {}": "unknown key; did you mean 'model'?",
        "model.name": "missing; set it to 'minilm', a folder, or a hub id",
        'model.nam = "minilm"': "unknown key; did you mean 'name'?",
        f'data.train = "{tmp_path}/none.jsonl"': (
            f"no such file: {tmp_path}/none.jsonl; name one that exists"
        ),
        "data.max_lenght = 3": "unknown key; did you mean 'max_length'?",
        'adapter.r = "6"': "must be a valid integer",
        "adapter.use_dorra = true": "unknown key; did you mean 'use_dora'?",
        'adapter.task_type = "CAUSAL_LM"': "follows from model.task; remove it",
        'adapter.bias = "non"': "must be 'none', 'all' or 'lora_only'; did you mean 'none'?",
        'budget.prest = "fixed"': "unknown key; did you mean 'preset'?",
        'budget.preset = "adalra"': (
            f"no such preset; did you mean 'adalora'? {presets}; a path ends in .toml"
        ),
        "budget.rank = -4": "must be greater than 0",
        "train.max_steps = 300.5": "must be a valid integer",
        "train.learning_rat = 0.001": "unknown key; did you mean 'learning_rate'?",
        'train.eval_strategy = "stepss"': (
            "must be 'no', 'steps' or 'epoch'; did you mean 'steps'?"
        ),
        "train.seed = 3": "is set at the top of the file, for everything at once; move it there",
        'data.label = "y", model.task = "seq2seq-lm"': "seq2seq-lm reads no such column; remove it",
        'data.target, model.task = "seq2seq-lm"': ("missing; set it to the column of the outputs"),
    }


def test_the_refusal_names_the_file_and_counts(write):
    path = write(CLASSIFIER)
    with pytest.raises(SpecError) as caught:
        load_run(path, ["model.dtype=float31"])
    assert str(caught.value) == (
        f"run '{path}' with overrides: 1 fault\n"
        '  model.dtype = "float31"\n'
        "    must be 'float32', 'bfloat16' or 'float16'; did you mean 'float32'?"
    )


def test_an_empty_file_misses_three_tables(write):
    assert faults_of(write("")) == {
        "model": "missing; add [model] with name and task",
        "data": "missing; add [data] with name or train",
        "budget": "missing; add [budget] with preset or rank",
    }


def test_a_file_that_is_not_toml_is_named_with_the_line(write):
    path = write("[model]\nname = minilm\n")
    with pytest.raises(SpecError, match=r"try\.toml is not valid TOML: .*line 2, column 8"):
        load_run(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SpecError, match=r"none\.toml cannot be read: No such file or directory"):
        load_run(tmp_path / "none.toml")


# Faults of one override each on a sound classifier.
ONE_FAULT = {
    "budget=3": ("budget = 3", "must be a table"),
    "seed.x=2": ('seed = {"x": 2}', "must be a valid integer"),
    "name=a/b": ('name = "a/b"', r"must match pattern '^\w[^/\\]*$'"),
    "model.name=": ('model.name = ""', "must have at least 1 character"),
    "model.name=./none": (
        'model.name = "./none"',
        "no such folder; must be 'minilm', a folder, or a hub id",
    ),
    "model.name=a/b/c": (
        'model.name = "a/b/c"',
        "no such folder; must be 'minilm', a folder, or a hub id",
    ),
    "model.revision=main": (
        'model.revision = "main", model.name = "minilm"',
        "only a hub id has revisions; remove it",
    ),
    "model.trust_remote_code=true": (
        "model.trust_remote_code = true",
        "unknown key; did you mean 'chat_template'?",
    ),
    "model.attention=flash": (
        'model.attention = "flash"',
        "must be 'eager', 'sdpa' or 'flash_attention_2'",
    ),
    "data.config=en": ('data.config = "en"', "only a hub id has configurations; remove it"),
    "data.train=[]": ("data.train = []", "must be a file or a list of files"),
    "data.train=[3]": ("data.train = [3]", "must be a file or a list of files"),
    "data.validation_fraction=1": ("data.validation_fraction = 1", "must be less than 1"),
    "data.max_length=0": ("data.max_length = 0", "must be greater than 0"),
    "data.target=summary": (
        'data.target = "summary", model.task = "sequence-classification"',
        "sequence-classification reads no such column; remove it",
    ),
    "model.task=token-classification": (
        'data.name = "docstrings", model.task = "token-classification"',
        "it has texts and classes only, for sequence-classification or causal-lm",
    ),
    "budget.preset=3": ("budget.preset = 3", "must be a preset's name or a path"),
    "budget.schedule=constant": (
        'budget.schedule = "constant", budget.start = 1.5',
        "a constant budget starts at its target; set start = 1, or another schedule",
    ),
    "adapter.r=0": ("adapter.r = 0", "must be 1 or more; the budget sets the ranks"),
    "adapter.peft_type=ADALORA": (
        'adapter.peft_type = "ADALORA"',
        "is always LORA; remove it (use_dora = true makes it DoRA)",
    ),
    "adapter.layers_pattern=h": (
        'adapter.target_modules = "all-linear", adapter.layers_pattern = "h"',
        "PEFT refuses it: `layers_pattern` cannot be used when `target_modules` is a str.",
    ),
    "train.max_steps=true": ("train.max_steps = true", "must be a valid integer"),
    "train.report_to=3": ("train.report_to = 3", "must be a valid string, or must be a valid list"),
    "train.optim=sdg": ('train.optim = "sdg"', "did you mean 'sgd'?"),
    "train.num_train_epochs=0": (
        "train.max_steps, train.num_train_epochs = 0",
        "trains no step; one of them must be above 0",
    ),
}


@pytest.mark.parametrize("override", ONE_FAULT)
def test_a_fault_is_named_alone_with_its_remedy(override, write):
    received, remedy = ONE_FAULT[override]
    faults = faults_of(write(CLASSIFIER), override)
    assert list(faults) == [received]
    assert remedy in faults[received]


def test_pooling_is_for_sequence_classification_only(write):
    assert faults_of(write(CLASSIFIER), "model.task=causal-lm", "model.pooling=cls") == {
        'model.pooling = "cls", model.task = "causal-lm"': (
            "only sequence-classification pools; remove pooling"
        )
    }


def test_a_causal_model_may_have_a_target_and_needs_none(write):
    path = write(SEQ2SEQ)
    assert load_run(path, ["model.task=causal-lm"]).data.target == "answer"
    path = write(SEQ2SEQ.replace('target = "answer"', ""))
    assert load_run(path, ["model.task=causal-lm"]).data.target is None


def test_the_built_in_rows_have_no_answers(write):
    assert faults_of(write(CLASSIFIER), "model.task=causal-lm", "data.target=label") == {
        'data.name = "docstrings", data.target = "label"': (
            "it has no answers; remove target, or name files"
        )
    }


def test_rows_come_by_name_or_from_files(write, tmp_path):
    text = CLASSIFIER.replace("[budget]", 'train = "a.jsonl"\ntest = "more/held.jsonl"\n[budget]')
    assert faults_of(write(text)) == {
        f'data.name = "docstrings", data.{key} = ["{tmp_path}/{file}"]': (
            "rows come by name or from files; keep one of these"
        )
        for key, file in (("train", "a.jsonl"), ("test", "more/held.jsonl"))
    }


def test_no_rows_at_all_is_a_fault(write):
    assert faults_of(write(CLASSIFIER.replace('name = "docstrings"', ""))) == {
        "data.name, data.train": "no data; set one of these"
    }


def test_a_file_of_an_unknown_type_is_refused(write, tmp_path):
    write("x", "a.txt")
    assert faults_of(write(CLASSIFIER), "data.train=a.txt") == {
        f'data.train = "{tmp_path}/a.txt"': (
            f"{tmp_path}/a.txt must end in one of .jsonl, .json, .csv, .parquet"
        )
    }


def test_a_fraction_beside_validation_files_is_a_fault(write, tmp_path):
    assert faults_of(write(SEQ2SEQ), "data.validation_fraction=0.2") == {
        f'data.validation_fraction = 0.2, data.validation = ["{tmp_path}/more/held.jsonl"]': (
            "nothing is held out where there are validation files; keep one of these"
        )
    }


def is_run(path):
    return "model" in tomllib.loads(path.read_text(encoding="utf-8"))


# Ablations have tests of their own: tests/ablation/test_specs.py.
TOMLS = [
    *(ROOT / "budgets").glob("*.toml"),
    *(path for path in (ROOT / "examples").rglob("*.toml") if path.parent.name != "ablations"),
]


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_toml_of_the_project_loads(path):
    spec = load_run(path) if is_run(path) else load_budget(path)
    assert (spec.budget if isinstance(spec, RunSpec) else spec).target[1] > 0
