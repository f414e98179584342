import json

import pytest

from rankflow.errors import SpecError
from rankflow.specs.ablation import BudgetPoint, digest_of, load_ablation

PLANTED = """
methods = ["lora", "dora", "hybrid"]
budgets = [2, { rank = 4, seeds = 3 }, { params = 41472, seeds = [7, 9] }]
seeds = 2
judge = "excess"
compare = [["hybrid", "lora"], ["hybrid", "dora"]]
[tasks.planted.teacher]
noise = 0.2
"""

TEXTS = """
methods = ["lora"]
budgets = [1]
[model]
name = "minilm"
task = "sequence-classification"
[data]
train = "train.jsonl"
validation = "val.jsonl"
test = "test.jsonl"
[train]
max_steps = 10
[tasks.first]
[tasks.second.data]
train = "other.jsonl"
max_length = 32
[tasks.second.train]
max_steps = 20
"""


@pytest.fixture
def load(tmp_path):
    """Write a spec, with empty files of rows beside it, and load it."""

    def run(text, *overrides, folder=None, name="try.toml"):
        (tmp_path / name).write_text(text)
        for file in ("train", "val", "test", "other"):
            (tmp_path / f"{file}.jsonl").touch()
        return load_ablation(tmp_path / name, overrides, folder)

    return run


def faults_of(load, text, *overrides):
    with pytest.raises(SpecError) as caught:
        load(text, *overrides)
    return str(caught.value)


def test_budgets_are_ranks_and_tables_with_seeds_of_their_own(load):
    spec = load(PLANTED)
    assert [budget.label for budget in spec.budgets] == ["rank 2", "rank 4", "41,472 parameters"]
    assert [spec.seeds_of(budget) for budget in spec.budgets] == [(0, 1), (0, 1, 2), (7, 9)]
    assert spec.budget("rank 4") == BudgetPoint(rank=4.0, seeds=3)
    assert spec.compare == (("hybrid", "lora"), ("hybrid", "dora"))


def test_a_planted_task_has_a_teacher_and_neither_model_nor_rows(load):
    shared = TEXTS.replace("[tasks.first]", "[tasks.first.teacher]\nnoise = 0.3")
    shared = shared[: shared.index("[tasks.second.data]")]
    task = load(shared.replace("budgets", 'judge = "excess"\nbudgets')).task("first")
    assert (task.model, task.data, task.forgetting) == (None, None, None)
    assert task.teacher.noise == 0.3
    assert task.train == {"max_steps": 10}


def test_a_task_says_only_what_differs_from_the_shared_tables(load, tmp_path):
    first, second = load(TEXTS).tasks
    assert (first.train, second.train) == ({"max_steps": 10}, {"max_steps": 20})
    assert first.data.train == (tmp_path / "train.jsonl",)
    assert second.data.train == (tmp_path / "other.jsonl",)
    assert second.data.validation == (tmp_path / "val.jsonl",)
    assert (first.data.max_length, second.data.max_length) == (128, 32)
    assert second.model.name == "minilm"


def test_a_source_of_data_replaces_the_other_source(load):
    text = TEXTS.replace('validation = "val.jsonl"\ntest = "test.jsonl"\n', "")
    spec = load(text, 'tasks.second.data={ name = "docstrings" }')
    assert spec.task("second").data.name == "docstrings"
    assert spec.task("second").data.train is None
    assert load(text, "data.name=docstrings").task("first").data.train is None


def test_relative_paths_start_at_the_folder_that_is_named(load, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "bert").mkdir(parents=True)
    for name in ("train", "val", "test", "other"):
        (elsewhere / f"{name}.jsonl").touch()
    spec = load(TEXTS, "model.name=bert", folder=elsewhere)
    assert spec.task("first").data.train == (elsewhere / "train.jsonl",)
    assert spec.task("first").model.name == str(elsewhere / "bert")


def test_a_task_is_identified_alike_in_every_folder(load, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("train", "val", "test", "other"):
        (elsewhere / f"{name}.jsonl").touch()
    here, there = load(TEXTS), load(TEXTS, folder=elsewhere)
    assert here.tasks != there.tasks
    assert [t.written for t in here.tasks] == [t.written for t in there.tasks]
    assert here.task("first").written != load(TEXTS, "train.max_steps=11").task("first").written
    assert str(tmp_path) not in here.task("first").written
    assert json.loads(here.task("first").written)["data"]["train"] == "train.jsonl"


def test_a_digest_depends_on_values_and_not_on_the_order_of_keys():
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of({"a": [2, 3]}) != digest_of({"a": [3, 2]})
    assert len(digest_of("x")) == 12


def test_a_variant_is_like_another_method_and_a_plain_name_is_like_itself(load):
    text = PLANTED.replace('"dora",', '"dora", "mine",')
    spec = load(text + '[method.mine]\nlike = "hybrid"\nbudget = { recycle = 0.1 }\n')
    assert spec.variant("mine").like == "hybrid"
    assert spec.variant("mine").budget == {"recycle": 0.1}
    assert spec.variant("lora").like == "lora"


def test_a_comparison_that_is_declared_twice_counts_once(load):
    spec = load(PLANTED, 'compare=[["hybrid", "lora"], ["hybrid", "lora"]]')
    assert spec.compare == (("hybrid", "lora"),)


EVERY_FAULT = """
metods = ["x"]
methods = ["lora", "dora"]
budgets = [2, "four", { rank = 1, params = 9 }, { rnak = 3 }]
seeds = 0
judge = "nll"
compare = [["lora", "dore"]]
interaction = ["lora", "dora", "lora", "dora"]
[tuning]
raets = [0.1]
[adapter]
lora_alhpa = 4
use_dora = true
[method.mine]
like = "lora"
[method.dora]
lik = "dora"
[train]
max_stpes = 3
learning_rate = 0.1
[tasks.a.model]
nmae = "minilm"
[tasks.a.data]
name = "docstrings"
[tasks.b.teacher]
nois = 0.1
[tasks.b.model]
name = "minilm"
[tasks.c]
modle = { name = "minilm" }
train = 3
"""


@pytest.mark.parametrize(
    "expected",
    [
        "metods = [\"x\"]\n    unknown key; did you mean 'methods'?",
        'budgets.1 = "four"\n    must be a rank, or a table',
        "budgets.2.rank = 1.0, budgets.2.params = 9\n    set one of these",
        "budgets.3.rnak = 3\n    unknown key; did you mean 'rank'?",
        "seeds = 0\n    must be a number of seeds, or a list of seeds",
        "compare names a method that is not run; did you mean 'dora'?",
        'interaction = ["lora", "dora", "lora", "dora"]\n    names a method twice',
        "tuning.raets = [0.1]\n    unknown key; did you mean 'rates'?",
        "adapter.lora_alhpa = 4\n    unknown key; did you mean 'lora_alpha'?",
        "adapter.use_dora = true\n    is decided by the method; list 'dora' instead",
        'method = {"mine": {"like": "lora"}}, methods = ["lora", "dora"]\n    is declared and not',
        "method.dora.lik = \"dora\"\n    unknown key; did you mean 'like'?",
        "\n  train.max_stpes = 3\n    unknown key; did you mean 'max_steps'?",
        "\n  train.learning_rate = 0.1\n    is tuned; set rates in [tuning]",
        "tasks.a.model.nmae = \"minilm\"\n    unknown key; did you mean 'name'?",
        "tasks.a.model.task\n    missing",
        "tasks.b.teacher.nois = 0.1\n    unknown key; did you mean 'noise'?",
        'tasks.b.model = {"name": "minilm"}\n    the planted teacher has none',
        'tasks.c.modle = {"name": "minilm"}\n    unknown key; did you mean \'model\'?',
        "tasks.c.train = 3\n    must be a table",
    ],
)
def test_every_fault_of_a_spec_is_reported_at_once(load, expected):
    found = faults_of(load, EVERY_FAULT)
    assert expected in found
    assert found.count(expected) == 1


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("budgets=[2, { rank = 2.0, seeds = 9 }]", "rank 2 is there twice"),
        ("seeds=[3, -1]", "must be a number of seeds, or a list of seeds"),
        ("seeds=[]", "must be a number of seeds, or a list of seeds"),
        ("tuning.seeds=[1, 100]", "no seed may be both tuned with and reported"),
        ("tuning.seeds=[8, 8]", "names one twice"),
        ("tuning.rates=[0.1, 0.1]", "names one twice"),
        ('compare=[["hybrid", "hybrid"]]', "names a method twice"),
        ("judge=nll", "the task 'planted' measures excess"),
        ("judge=los", "did you mean"),
        ("methods=lora", "methods"),
        ("name=..", "name"),
        ("tasks.planted=3", "tasks.planted = 3\n    must be a table"),
        ("teacher=3", "teacher = 3\n    must be a table"),
        ("train.max_steps", "must read as in"),
        ("budgets=[true]", "must be a rank"),
        ("budgets=[-1]", "budgets.0.rank = -1.0"),
    ],
)
def test_a_wrong_value_is_refused_with_what_must_hold(load, override, expected):
    assert expected in faults_of(load, PLANTED, override)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("judge=perplexity", "the task 'first' measures nll and accuracy"),
        ("tasks.first.train.max_steps=0.5", "tasks.first.train.max_steps = 0.5"),
        ("tasks.first.data.train=none.jsonl", "no such file"),
        ("model.task=causal-lm", None),
        ("data.target=text", "reads no such column"),
        ("tasks.first.train.seed=3", "is each cell's own; set seeds at the top"),
    ],
)
def test_tasks_on_text_are_checked_with_their_files(load, override, expected):
    if expected is None:
        assert load(TEXTS, override).task("first").metrics == ("nll", "perplexity")
    else:
        assert expected in faults_of(load, TEXTS, override)


def test_a_task_that_cannot_be_judged_is_refused(load):
    found = faults_of(load, TEXTS, "model.task=seq2seq-lm", "data.target=text")
    assert "an ablation judges sequence-classification" in found
    assert found.count("seq2seq-lm") == 1  # once, although two tasks share it


def test_tuning_seeds_may_be_reported_where_nothing_is_tuned(load):
    spec = load(PLANTED, "tuning.enabled=false", "tuning.seeds=[0]")
    assert spec.tuning.seeds == [0]
