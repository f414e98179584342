from dataclasses import replace

import pytest

from rankflow.ablation.provenance import digest_cell, trace
from rankflow.ablation.records import Cell

CELL = Cell("planted", "rank 2", "hybrid", "test", 0, 0.02)


@pytest.mark.parametrize(
    "override",
    [
        "train.max_steps=4",
        "tasks.planted.teacher.noise=0.2",
        "adapter.lora_alpha=8",
        "head_rate=0.1",
        'method.hybrid={ like = "hybrid", budget = { recycle = 0.5 } }',
        'method.hybrid={ like = "hybrid", use_dora = false, budget = { magnitude = "always" } }',
        'method.hybrid={ like = "hybrid", factor = 1.25 }',
    ],
)
def test_what_decides_a_result_changes_its_digest(planted, override):
    assert digest_cell(planted(), CELL) != digest_cell(planted(override), CELL)


@pytest.mark.parametrize(
    "override",
    [
        "description=words",
        "seeds=7",
        "budgets=[2, 4]",
        'methods=["frozen-pattern", "hybrid", "lora", "dora"]',
        "tuning.rates=[0.1]",
        "alpha=0.01",
        'method.hybrid={ like = "hybrid", rate = 0.5 }',
    ],
)
def test_what_does_not_decide_a_result_leaves_its_digest(planted, override):
    assert digest_cell(planted(), CELL) == digest_cell(planted(override), CELL)


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"rate": 0.04}, {"split": "validation"}, {"method": "lora"}, {"scaling": 2.0}],
)
def test_every_cell_has_a_digest_of_its_own(planted, change):
    assert digest_cell(planted(), CELL) != digest_cell(planted(), replace(CELL, **change))


def test_a_control_is_another_one_when_its_source_is(planted):
    cell = replace(CELL, method="frozen-pattern")
    changed = planted('method.hybrid={ like = "hybrid", budget = { recycle = 0.5 } }')
    assert digest_cell(planted(), cell) != digest_cell(changed, cell)


def test_methods_and_rates_of_a_task_share_the_seed_and_tasks_do_not():
    seeds = {replace(CELL, method=m, rate=r).training_seed for m in "ab" for r in (0.1, 0.2)}
    assert len(seeds) == 1
    assert replace(CELL, task="other").training_seed not in seeds
    assert replace(CELL, seed=1).training_seed not in seeds


def test_a_result_tells_versions_and_machine():
    found = trace("x")
    assert {"rankflow", "torch", "peft", "transformers"} <= set(found.versions)
    assert found.machine
    assert found.finished.endswith("+00:00")
