import math
from dataclasses import replace

import numpy as np
import pytest

from rankflow.ablation.report.document import Table
from rankflow.ablation.report.pairs_table import pair_blocks
from rankflow.ablation.report.rows import gather, method_row
from rankflow.ablation.report.tables import method_blocks, overview
from rankflow.ablation.report.verdicts import judge


def rows_of(spec, results):
    gathered = gather(spec, results)
    return {place: method_row(gathered, place) for place in gathered.tests}


def tables(spec, results, sizes=None):
    blocks = method_blocks(spec, rows_of(spec, results), sizes or {})
    return [block for block in blocks if isinstance(block, Table)]


def cell(table, row, column):
    line = next(line for line in table.rows if line[0] == row)
    return line[table.columns.index(column)]


def test_the_overview_has_every_method_and_every_mean(draw):
    scenario = draw()
    results = scenario.results()
    table = overview(scenario.spec, rows_of(scenario.spec, results))
    assert [row[0] for row in table.rows] == list(scenario.methods)
    assert len(table.columns) == 1 + 2 * 3
    for task in scenario.tasks:
        for rank in (1, 2, 4):
            for method in scenario.methods:
                values = [
                    r.metrics["nll"]
                    for r in results
                    if r.cell.split == "test"
                    and (r.cell.task, r.cell.budget, r.cell.method)
                    == (task, f"rank {rank}", method)
                ]
                text = cell(table, method, f"{task}, rank {rank}")
                mean, half = map(float, text.split(" ± "))
                assert mean == pytest.approx(np.mean(values), abs=1e-3)
                reach = 2.7764451 * np.std(values, ddof=1) / math.sqrt(5)  # t of 4 degrees
                assert half == pytest.approx(reach, abs=1e-3)


def test_the_best_mean_of_each_column_is_bold(draw):
    scenario = draw()
    table = overview(scenario.spec, rows_of(scenario.spec, scenario.results()))
    hybrid = list(scenario.methods).index("hybrid")
    assert table.strong == {(hybrid, column) for column in range(1, 7)}


def test_what_broke_is_marked_in_the_tables_and_in_a_legend(broken):
    spec, results = broken
    table = overview(spec, rows_of(spec, results))
    assert cell(table, "dora", "clinc, rank 1").endswith(" (1 of 5 diverged)")
    assert cell(table, "dora", "clinc, rank 2").endswith(" †")
    assert cell(table, "prompt", "clinc, rank 2").endswith(" ‡")
    assert cell(table, "prompt", "wordnet, rank 2") == "unsupported"
    assert "† ended above the budget." in table.notes
    assert "‡ ended more than 5% below the budget." in table.notes
    assert not any("nan" in text or "inf" in text for row in table.rows for text in row)


def test_a_clean_table_has_no_legend_of_signs(draw):
    scenario = draw()
    table = overview(scenario.spec, rows_of(scenario.spec, scenario.results()))
    assert not any(note[0] in "†‡" for note in table.notes)


def test_a_method_whose_seeds_all_diverged_or_failed_says_so(draw, change):
    scenario = draw(tasks={"clinc": 0.5}, ranks=(1,))
    every = tuple(range(5))
    results = change(scenario.results(), "lora", seeds=every, value=math.nan)
    results = change(results, "dora", seeds=every, status="failed", reason="out of memory")
    table = overview(scenario.spec, rows_of(scenario.spec, results))
    assert cell(table, "lora", "clinc, rank 1") == "diverged"
    assert cell(table, "dora", "clinc, rank 1") == "failed"


def test_costs_stand_beside_quality(draw):
    scenario = draw(tasks={"clinc": 0.5}, ranks=(2,))
    reached, taken = tables(scenario.spec, scenario.results(), {"lora": "rank"})
    row = rows_of(scenario.spec, scenario.results())
    lora = next(r for place, r in row.items() if place.method == "lora")
    assert cell(reached, "lora", "of budget") == "99.0%"
    assert cell(reached, "lora", "inference as trained") == f"{lora.unmerged:.2f}x"
    assert cell(reached, "lora", "inference merged") == "1.00x"
    assert cell(reached, "prompt", "inference merged") == "cannot be merged"
    assert cell(reached, "lora", "step (wall)") == f"{1000 * lora.step:.3g} ms"
    assert cell(reached, "lora", "step (CPU)") == f"{1000 * lora.cpu_step:.3g} ms"
    assert cell(reached, "lora", "peak memory of a step") == f"{lora.peak_bytes / 1e6:.3g} MB"
    assert cell(reached, "lora", "similarity before → after") == f"0.8400 → {lora.after.mean:.4f}"
    assert cell(reached, "lora", "seeds") == "5 of 5"
    assert cell(taken, "lora", "size") == "rank 2"
    assert cell(taken, "hybrid", "size") == "-"
    assert cell(taken, "hybrid", "final parameters") == "19,800"
    assert cell(taken, "hybrid", "peak") == "30,000"
    assert cell(taken, "hybrid", "of budget at the peak") == "150.0%"
    assert cell(taken, "lora", "stored") == "19,800"
    assert cell(taken, "lora", "learning rate") == "0.001"
    assert taken.notes == (
        "Budget: 20,000 parameters.",
        "A task head of 5,000 parameters trains with it and is not counted.",
    )


def test_a_tuned_scaling_has_a_column(draw):
    scenario = draw(tasks={"clinc": 0.5}, ranks=(2,))
    results = scenario.results()
    assert "scaling" not in tables(scenario.spec, results)[1].columns
    scaled = [
        replace(r, cell=replace(r.cell, scaling=2.0)) if r.cell.method == "dora" else r
        for r in results
    ]
    assert cell(tables(scenario.spec, scaled)[1], "dora", "scaling") == "2"


def test_the_table_of_comparisons_holds_every_statistic(draw):
    scenario = draw()
    gathered = gather(scenario.spec, scenario.results())
    verdict = judge(gathered, "rank 1")
    table = next(block for block in pair_blocks([verdict]) if isinstance(block, Table))
    found = verdict.comparisons[0]
    line = dict(zip(table.columns, table.rows[0], strict=True))
    assert line["ours - theirs"] == "hybrid - lora"
    assert (line["budget"], line["task"], line["outcome"]) == ("rank 1", "all 2", "better")
    assert line["difference"] == f"{100 * math.expm1(found.mean):+.1f}%"
    assert line["low"] == f"{100 * math.expm1(found.low):+.1f}%"
    assert line["high"] == f"{100 * math.expm1(found.high):+.1f}%"
    assert line["p"] == f"{found.p:.3f}"
    assert line["p (Holm)"] == f"{found.p_holm:.3f}"
    assert (line["pairs"], line["diverged"], line["unpaired"]) == ("10", "0", "0")
    assert line["margin"] == "1.0%"


def test_without_comparisons_there_is_no_table_of_them(draw):
    scenario = draw(compare=())
    assert pair_blocks([judge(gather(scenario.spec, scenario.results()), "rank 1")]) == []
