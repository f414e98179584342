"""The recipe for large models, on a tiny one: its script, its plan, and two of its methods."""

import json
import runpy
from pathlib import Path

import datasets
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from rankflow.ablation.store import Store
from rankflow.cli import app

FOLDER = Path(__file__).parents[2] / "examples" / "ablations"
SPECIAL = ["<pad>", "<unk>", "<s>", "</s>"]
TASKS = ("boolq", "piqa")


@pytest.fixture(autouse=True)
def caches_in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def make_rows(count, task):
    answers = ("true", "false") if task == "boolq" else ("solution1", "solution2")
    return [
        {
            "instruction": f"Please answer : is {i} even ?\n",
            "input": f"{task} {i}" if i % 3 == 0 else "",
            "output": f"the correct answer is {answers[i % 2]}",
            "answer": answers[i % 2],
        }
        for i in range(count)
    ]


@pytest.fixture
def data(tmp_path, capsys):
    """What the script makes of files in LLM-Adapters' form."""
    (tmp_path / "train.json").write_text(json.dumps(make_rows(60, "boolq") * 2))
    paths = [tmp_path / "train.json"]
    for count, task in zip((30, 12), TASKS, strict=True):
        paths.append(tmp_path / f"{task}.json")
        paths[-1].write_text(json.dumps(make_rows(count, task)))
    main = runpy.run_path(str(FOLDER / "commonsense.py"))["main"]
    options = ["--out", str(tmp_path / "data"), "--validation-rows", "10", "--test-rows", "12"]
    main([*map(str, paths), *options])
    return tmp_path / "data"


def read(data, split):
    text = (data / "commonsense" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_row_is_a_prompt_and_the_answer_that_goes_on_from_it(data):
    rows = {row["prompt"]: row["target"] for row in read(data, "test")}
    assert rows["### Instruction:\nPlease answer : is 1 even ?\n\n### Response:\n"] in (
        "the correct answer is false",
        "the correct answer is solution2",
    )
    with_input = "### Instruction:\nPlease answer : is 0 even ?\n\n### Input:\npiqa 0\n\n"
    assert rows[f"{with_input}### Response:\n"] == "the correct answer is solution1"


def test_tasks_weigh_alike_and_nothing_validated_is_learned(data):
    targets = [row["target"].split()[-1] for row in read(data, "test")]
    assert sum(t in ("true", "false") for t in targets) == len(targets) / 2 == 12
    train, validation = read(data, "train"), read(data, "validation")
    assert len(validation) == 10
    held_out = {row["prompt"] for row in validation}
    assert held_out.isdisjoint(row["prompt"] for row in train)
    assert len(train) == 2 * (60 - len(held_out))


@pytest.fixture
def llama(tmp_path, data):
    """A tiny Llama of random weights, whose tokenizer knows the words of the rows."""
    texts = [f"{row['prompt']} {row['target']}" for row in read(data, "train")]
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 2)]
    )
    names = dict(zip(("pad_token", "unk_token", "bos_token", "eos_token"), SPECIAL, strict=True))
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def ablate(data, llama, tmp_path):
    """Run the spec on the tiny model; returns what was printed and the results."""

    def run(*options):
        command = ["ablate", str(FOLDER / "llm-commonsense.toml"), "--data", str(data)]
        command += ["--out", str(tmp_path / "out"), "--executor", "here"]
        for override in (f"model.name={llama}", "data.max_length=40", "budgets=[2]"):
            command += ["--set", override]
        result = CliRunner().invoke(
            app, [*command, *options], env={"COLUMNS": "200"}, catch_exceptions=False
        )
        assert result.exit_code == 0
        return result.output, list(Store(str(tmp_path / "out")).load().values())

    return run


def test_the_recipe_plans_at_equal_parameters(ablate):
    pytest.importorskip("bitsandbytes", reason="qlora and qdora are over a base in 4 bits")
    printed, results = ablate("--dry-run")
    q, kv, mlp = 32 + 32, 32 + 16, 32 + 48  # parameters of a component
    budget = 2 * 2 * (q + 2 * kv + 2 * mlp)
    assert printed.count(f" {budget:,} ") == 8  # all but adalora and the two at 1.5x
    assert "cannot run" not in printed
    assert results == []


def test_two_of_its_methods_train_and_are_judged_by_their_answers(ablate):
    small = ("train.max_steps=4", "train.warmup_steps=0", "seeds=1", "tuning.enabled=false")
    options = [part for text in small for part in ("--set", text)]
    printed, results = ablate(*options, "--only", "/(hybrid|lora)$")
    assert {result.cell.method: result.reason for result in results} == {"hybrid": "", "lora": ""}
    for result in results:
        assert result.status == "done"
        assert result.parameters.final <= result.parameters.budget
        assert set(result.metrics) == {"nll", "perplexity", "accuracy"}
        assert (result.metrics["accuracy"] * 24).is_integer()
    assert "Verdict" in printed
