"""Every example runs, and says what it promises."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from rankflow.report.events import read_events
from rankflow.specs.run import load_run

EXAMPLES = Path(__file__).parents[1] / "examples"
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def _run(name: str) -> None:
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def test_the_custom_loop_ends_as_a_stock_adapter_of_equal_outputs(capsys):
    _run("custom_loop.py")
    out = capsys.readouterr().out
    assert out.count("pruned") > 5
    difference = float(out.split("differs by at most")[1])
    assert difference <= 1e-5


def test_the_loop_of_cuda_graphs_runs_without_them_too(capsys):
    _run("cuda_graphs.py")
    out = capsys.readouterr().out
    events = out.count("pruned")
    assert events > 5
    has_no_gpu = "no GPU, and no graph" in out
    assert has_no_gpu or _last_number(out, " captures for") == events + 1
    assert _stock_difference(out) <= 1e-5


def test_the_callback_prunes_a_trainers_model_to_its_budget(capsys):
    _run("trainer_callback.py")
    first = next(line for line in capsys.readouterr().out.splitlines() if "reallocations" in line)
    events, rest = first.split(" reallocations, ")
    spent, limit = (int(n.replace(",", "")) for n in rest.split(" parameters")[0].split(" of "))
    assert int(events) > 3
    assert spent <= limit


def test_a_diffusion_models_dora_is_loaded_by_diffusers_with_equal_outputs(monkeypatch, capsys):
    pytest.importorskip("diffusers")
    example = runpy.run_path(str(EXAMPLES / "diffusers_dora.py"))
    monkeypatch.setitem(example["main"].__globals__, "STEPS", 40)
    example["main"]()
    *events, ranks, difference = capsys.readouterr().out.splitlines()
    assert all("pruned" in event for event in events)
    assert float(ranks.split("loss")[1]) < 0.6
    assert float(difference.split("differs by at most")[1]) <= 1e-5


def _last_number(text: str, before: str) -> float:
    """Return the number that stands before some words."""
    return float(text.split(before)[0].split()[-1].rstrip("%"))


def _stock_difference(text: str) -> float:
    return float(text.split("stock PEFT differs by at most")[1].split()[0])


# TRL's own default is an argument that transformers has renamed.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_a_chat_model_learns_the_assistants_words_with_trl(capsys):
    _run("sft_trl.py")
    out = capsys.readouterr().out
    for fruit, colour in {"banana": "yellow", "cherry": "red", "lime": "green"}.items():
        assert f"{fruit}: {colour} <end>" in out
    assert _last_number(out, " reallocations") > 5
    assert _stock_difference(out) <= 1e-5


def test_words_are_tagged_under_a_budget(capsys):
    _run("token_classification.py")
    out = capsys.readouterr().out
    assert _last_number(out, " of the tags are right") > 70
    assert _stock_difference(out) <= 1e-5


def test_bart_generates_what_it_learned_under_one_budget(capsys):
    _run("seq2seq_bart.py")
    out = capsys.readouterr().out
    assert _last_number(out, " of unseen rows come out right") > 90
    assert _stock_difference(out) <= 1e-5
    assert "model.decoder.layers.0.encoder_attn.q_proj" in out


def test_a_vision_transformer_is_adapted_with_its_patch_embedding(capsys):
    _run("vision_transformer.py")
    out = capsys.readouterr().out
    assert _last_number(out, " of unseen images are told right") > 80
    assert _stock_difference(out) <= 1e-5
    assert "patch_embeddings.projection" in out


def test_a_vision_language_model_shares_a_budget_between_projector_and_language(capsys):
    _run("vision_language.py")
    out = capsys.readouterr().out
    assert _last_number(out, " of unseen images are described right") > 90
    assert _stock_difference(out) <= 2e-5
    assert "multi_modal_projector.linear_1" in out
    assert "vision_tower" not in out


def test_experts_get_ranks_as_they_get_tokens(capsys):
    _run("mixture_of_experts.py")
    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if "tokens" in line]
    ranks = [int(row[-1]) for row in rows]
    assert [int(row[1]) for row in rows][-3:] == ranks[-3:] == [0, 0, 0]
    assert min(ranks[:3]) > max(ranks[3:])
    assert _stock_difference(out) <= 1e-5


def test_what_is_a_layer_in_a_model_of_stacked_experts_is_adapted(capsys):
    _run("shared_experts.py")
    out = capsys.readouterr().out
    assert "4 stacked weights" in out
    rows = [line.split() for line in out.splitlines() if line.startswith("  model.")]
    ranks = {site: int(rank) for site, rank in rows}
    assert {site.split(".")[3] for site in ranks} == {"self_attn", "mlp"}
    assert all("shared_expert" in site for site in ranks if ".mlp." in site)
    assert all(rank <= 1 for site, rank in ranks.items() if site.endswith("shared_expert_gate"))
    assert len(set(ranks.values())) > 2
    assert _last_number(out, " of the numbers come out right") == 100
    assert _stock_difference(out) <= 1e-5


def test_two_tasks_are_served_from_one_base_and_one_of_them_gets_better(capsys):
    _run("two_tasks.py")
    lines = capsys.readouterr().out.splitlines()
    answers = dict(line.split(": ") for line in lines if " from " in line)
    assert answers["up from 3"] == "[5, 6, 7, 8, 9]"
    assert answers["up from 9"] == "[11, 12, 13, 14, 15]"
    assert answers["down-2 from 3"] == "[1, 0, 15, 14, 13]"
    assert answers["down-2 from 9"] == "[7, 6, 5, 4, 3]"
    alone = [answers["down from 9"], answers["down-2 from 9"]]
    assert alone[0] != alone[1]
    assert answers["both in one batch, from 9"] == f"[{', '.join(alone)}]"
    assert lines[-1] == "adapters now: up, down-2"


def test_the_quickstarts_run_spec_loads():
    assert load_run(EXAMPLES / "quickstart" / "run.toml").budget.target


def test_the_job_on_two_processes_moves_ranks_as_one_does(tmp_path):
    """In a short form: 14 steps on fewer rows."""
    short = {
        "data.max_train_rows": 320,
        "data.max_eval_rows": 32,
        "train.max_steps": 14,
        "train.warmup_steps": 3,
        "train.report_to": "none",
        "budget.every": 0.1,
    }
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "rankflow"]
    events = []
    for name, starter, rows in (("one", ["rankflow"], 32), ("two", launch, 16)):
        settings = {"train.per_device_train_batch_size": rows, "train.output_dir": tmp_path / name}
        sets = [f"--set={key}={value}" for key, value in (short | settings).items()]
        command = [sys.executable, "-m", *starter, "train", EXAMPLES / "ddp" / "run.toml", *sets]
        ended = subprocess.run(command, env=ONE_THREAD, capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        events.append(read_events(tmp_path / name / "events.jsonl"))
    one, two = events
    assert [event.ranks for event in one] == [event.ranks for event in two]
    assert [event.magnitudes for event in one] == [event.magnitudes for event in two]
    assert len({tuple(event.ranks.values()) for event in one}) > 2


def test_the_picture_shows_what_is_needed_and_every_method(monkeypatch, tmp_path, capsys):
    picture = runpy.run_path(str(EXAMPLES / "hybrid_picture.py"))
    monkeypatch.setitem(picture["train"].__globals__, "STEPS", 20)
    picture["main"](str(tmp_path / "hybrid.png"))
    assert (tmp_path / "hybrid.png").read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(picture["METHODS"])


def test_the_index_names_every_example():
    index = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/-]+\.(?:py|toml))`", index))
    scripts = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.py")}
    specs = {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.toml")}
    assert scripts | specs == named


def test_no_example_is_longer_than_120_lines():
    long = [p.name for p in EXAMPLES.glob("*.py") if len(p.read_text().splitlines()) > 120]
    assert long == []
