"""The acceptance script judges rows rightly, on a small suite of our own in the place of PEFT's."""

import importlib
from pathlib import Path

import peft
import pytest

PREAMBLE = """
import peft, pytest, torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn

def adapted(**config):
    base = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6))
    return get_peft_model(base, LoraConfig(**{"target_modules": ["0", "1"], **config}))
"""
HOLDS = """
@pytest.mark.parametrize("use_dora", [True, False])
def test_merging_keeps_the_output(use_dora):
    model = adapted(use_dora=use_dora, init_lora_weights=False).eval()
    x = torch.randn(3, 8)
    y = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), y)
"""
ASSERTS_THE_RANK = """
def test_the_rank_is_the_configs():
    assert adapted(r=5).base_model.model[0].r["default"] == 5
"""


@pytest.fixture
def modules(monkeypatch):
    """Import a module of the script as the script does."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    return importlib.import_module


@pytest.fixture
def run(modules, tmp_path, monkeypatch, capsys):
    """Run the script on tests, and return its exit code and what it says at its end."""
    suite = modules("peft_suite")

    def run(*tests, exclusions=(), version=peft.__version__):
        (tmp_path / "tests").mkdir()
        (tmp_path / "setup.py").write_text(f'VERSION = "{version}"\n')
        (tmp_path / "tests" / "test_ours.py").write_text(PREAMBLE + "".join(tests))
        monkeypatch.setattr(suite, "EXCLUSIONS", exclusions)
        code = suite.main([str(tmp_path), "--file", "test_ours.py"])
        return code, capsys.readouterr().out.rpartition("rows may concern LoRA")[2]

    return run


def figures(report, scene):
    """The numbers of one scene: passed, failed, unshown, untouched, excluded."""
    lines = report.partition(f"\n{scene} (")[2].splitlines()[1:6]
    return [int(line.split()[0]) for line in lines]


def test_rows_count_where_ranks_moved_as_the_scene_wants(run):
    code, report = run(
        HOLDS,
        "def test_makes_no_adapter(): pass\n",
        "def test_never_passes(): assert False\n",
        "@pytest.mark.parametrize('config_cls', [IA3Config])\n"
        "def test_of_another_method(config_cls): assert False\n",
    )
    assert code == 0
    assert "passes 3 here, skips 0 and fails 1" in report
    assert figures(report, "uneven") == [2, 0, 0, 1, 0]
    assert figures(report, "dead") == [2, 0, 0, 1, 0]
    assert figures(report, "magnitude-off") == [1, 0, 1, 1, 0]
    assert "2 pass; of their 2 adapters events pruned 2, and 2 have a site of rank 0" in report


def test_a_row_that_only_stock_peft_passes_fails_the_suite(run):
    code, report = run(HOLDS, ASSERTS_THE_RANK)
    assert code == 1
    assert figures(report, "uneven") == [2, 1, 0, 0, 0]
    assert "FAILED uneven" in report
    assert "test_the_rank_is_the_configs" in report


def test_exclusions_must_be_needed(run, modules):
    needed, needless = (
        modules("exclusions").Exclusion("test_ours.py", pattern, "it asserts a rank")
        for pattern in ("the_rank_is", "merging")
    )
    code, report = run(HOLDS, ASSERTS_THE_RANK, exclusions=[needed, needless])
    assert code == 1
    assert figures(report, "dead") == [0, 0, 0, 0, 1]
    assert "     1     1     1  it asserts a rank" in report
    assert "NEEDLESS uneven" in report
    assert "STALE test_ours.py merging" in report
    assert "the_rank_is:" not in report


def test_adapters_that_are_added_are_steered_and_those_that_are_loaded_are_not(run):
    code, report = run(
        "def test_round_trip(tmp_path):\n"
        "    model = adapted(use_dora=True, init_lora_weights=False)\n"
        "    model.add_adapter('other', LoraConfig(r=5, target_modules=['0']))\n"
        "    assert not model.base_model.model[0].lora_A['other'].weight.requires_grad\n"
        "    model.save_pretrained(tmp_path)\n"
        "    loaded = PeftModel.from_pretrained(model.unload(), tmp_path)\n"
        "    loaded.load_adapter(tmp_path / 'other', 'other')\n"
    )
    assert code == 0
    assert "of their 2 adapters" in report


def test_tests_of_another_version_are_refused_with_both(run):
    with pytest.raises(SystemExit, match=rf"of PEFT 0.1.0, and {peft.__version__} is installed"):
        run(HOLDS, version="0.1.0")
