import math
from dataclasses import replace

from rankflow.ablation.records import Place
from rankflow.ablation.report.document import Bullets, Paragraph, Table
from rankflow.ablation.report.rows import gather
from rankflow.ablation.report.tuning import tuning_blocks, tuning_rows

LORA = Place("clinc", "rank 1", "lora")


def small(draw, **keys):
    return draw(tasks={"clinc": 0.5}, ranks=(1,), seeds=2, **keys)


def warnings(blocks):
    return [f"{i.lead} {i.text}" for b in blocks if isinstance(b, Bullets) for i in b.items]


def test_every_rate_that_was_tried_is_there_with_the_chosen_one_marked(draw):
    scenario = small(draw)
    results = scenario.results()
    blocks = tuning_blocks(gather(scenario.spec, results))
    table = next(block for block in blocks if isinstance(block, Table))
    assert table.columns == ("method", "5e-4", "1e-3", "2e-3")
    for r, (method, *texts) in enumerate(table.rows):
        tried = [
            result.metrics["nll"]
            for result in results
            if result.cell.split == "validation" and result.cell.method == method
        ]
        assert [float(text.removesuffix(" ◂")) for text in texts] == [
            float(f"{value:.4f}") for value in tried
        ]
        assert [text.endswith("◂") for text in texts] == [False, True, False]
        assert (r, 2) in table.strong
    assert warnings(blocks) == []


def test_tuning_seeds_are_averaged_and_one_that_broke_is_not_hidden(draw):
    scenario = small(draw)
    tuning = scenario.spec.tuning.model_copy(update={"seeds": (100, 101)})
    spec = scenario.spec.model_copy(update={"tuning": tuning})
    results = scenario.results()
    second = [
        replace(r, cell=replace(r.cell, seed=101), metrics={"nll": r.metrics["nll"] + 0.1})
        for r in results
        if r.cell.split == "validation"
    ]
    first = {
        r.cell.rate: r.metrics["nll"]
        for r in results
        if r.cell == replace(r.cell, method="lora", split="validation")
    }
    (row,) = tuning_rows(gather(spec, [*results, *second]), LORA)
    assert all(math.isclose(row.values[rate], nll + 0.05) for rate, nll in first.items())
    second[0] = replace(second[0], metrics={"nll": math.nan})
    (row,) = tuning_rows(gather(spec, [*results, *second]), LORA)
    assert math.isnan(row.values[second[0].cell.rate])
    blocks = tuning_blocks(gather(spec, [*results, *second]))
    table = next(block for block in blocks if isinstance(block, Table))
    assert table.rows[0][1] == "broke"


def test_the_best_at_the_edge_of_the_grid_is_a_warning(draw):
    scenario = small(draw)
    results = [
        r
        for r in scenario.results()
        if r.cell.split == "test" or r.cell.rate <= 1e-3 or r.cell.method != "lora"
    ]
    found = warnings(tuning_blocks(gather(scenario.spec, results)))
    assert len(found) == 1
    assert found[0].startswith("Edge. lora on clinc at rank 1: 1e-3 is the best and at the edge")


def test_a_rate_that_broke_closes_the_grid(draw):
    scenario = small(draw)
    results = [
        replace(r, metrics={"nll": math.inf})
        if r.cell.split == "validation" and r.cell.rate == 2e-3
        else r
        for r in scenario.results()
    ]
    assert warnings(tuning_blocks(gather(scenario.spec, results))) == []


def test_a_run_at_another_rate_than_the_best_is_a_warning(draw):
    scenario = small(draw)
    results = [
        replace(r, cell=replace(r.cell, rate=2e-3))
        if r.cell.split == "test" and r.cell.method == "dora"
        else r
        for r in scenario.results()
    ]
    assert warnings(tuning_blocks(gather(scenario.spec, results))) == [
        "Not the best. dora on clinc at rank 1 ran at 2e-3, though 1e-3 was better in tuning."
    ]


def test_scalings_have_rows_of_their_own(draw):
    scenario = small(draw)
    scaled = [
        replace(
            r,
            cell=replace(r.cell, scaling=2.0),
            metrics={name: value * 0.9 for name, value in r.metrics.items()},
        )
        for r in scenario.results()
        if r.cell.method == "lora" and r.cell.split == "validation"
    ]
    gathered = gather(scenario.spec, [*scenario.results(), *scaled])
    one, two = tuning_rows(gathered, LORA)
    assert (one.scaling, one.chosen, one.best) == (1.0, 1e-3, None)
    assert (two.scaling, two.chosen, two.best) == (2.0, None, 1e-3)
    blocks = tuning_blocks(gathered)
    table = next(block for block in blocks if isinstance(block, Table))
    assert [row[:2] for row in table.rows[:2]] == [("lora", "1"), ("lora", "2")]
    assert warnings(blocks) == [
        "Not the best. lora on clinc at rank 1 ran at 1e-3, though 1e-3 (scaling 2) was better in "
        "tuning."
    ]


def test_the_highest_accuracy_is_the_best(draw):
    scenario = small(draw, judge="accuracy")
    (row,) = tuning_rows(gather(scenario.spec, scenario.results()), LORA)
    assert row.best == max(row.values, key=row.values.__getitem__) == 1e-3


def test_without_tuning_it_says_so(draw):
    scenario = small(draw, enabled=False)
    blocks = tuning_blocks(gather(scenario.spec, scenario.results()))
    assert isinstance(blocks[1], Paragraph)
    assert "were not tuned" in blocks[1].text
    assert len(blocks) == 2
