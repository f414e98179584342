import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from rankflow.ablation.records import Place
from rankflow.ablation.report.rows import best_row, gather, method_row
from rankflow.errors import RankFlowError

CLINC = Place("clinc", "rank 2", "hybrid")


def finished(results, place, name):
    return [
        result.metrics[name]
        for result in results
        if (result.cell.task, result.cell.budget, result.cell.method)
        == (place.task, place.budget, place.method)
        and result.cell.split == "test"
    ]


def test_a_row_holds_the_mean_and_students_interval_of_the_test_seeds(draw):
    scenario = draw()
    results = scenario.results()
    row = method_row(gather(scenario.spec, reversed(results)), CLINC)
    values = np.array(finished(results, CLINC, "nll"))
    low, high = stats.t.interval(0.95, 4, values.mean(), stats.sem(values))
    assert row.quality.mean == pytest.approx(values.mean(), rel=1e-12)
    assert (row.quality.low, row.quality.high) == pytest.approx((low, high), rel=1e-12)
    assert row.others["accuracy"].mean == pytest.approx(
        np.mean(finished(results, CLINC, "accuracy"))
    )
    assert row.seeds == (0, 1, 2, 3, 4)


def test_costs_are_medians_over_seeds_so_that_one_slow_run_moves_nothing(draw):
    scenario = draw()
    results = scenario.results()
    place = Place("clinc", "rank 1", "lora")
    own = [
        r
        for r in results
        if r.cell.split == "test"
        and r.cell.method == "lora"
        and r.cell.task == "clinc"
        and r.cell.budget == "rank 1"
    ]
    before = method_row(gather(scenario.spec, results), place)
    assert before.step == np.median([r.seconds_per_step for r in own])
    assert before.cpu_step == np.median([r.cpu_seconds_per_step for r in own])
    assert before.peak_bytes == np.median([r.peak_bytes for r in own])
    assert before.unmerged == np.median([r.latency.unmerged / r.latency.base for r in own])
    assert before.merged == 1.0
    slowest = max(own, key=lambda r: r.seconds_per_step)
    results[results.index(slowest)] = replace(slowest, seconds_per_step=1e3)
    assert method_row(gather(scenario.spec, results), place).step == before.step


def test_a_seed_that_diverged_is_in_no_mean_and_is_counted(broken):
    spec, results = broken
    place = Place("clinc", "rank 1", "dora")
    row = method_row(gather(spec, results), place)
    finite = [v for v in finished(results, place, "nll") if math.isfinite(v)]
    assert len(finite) == 4
    assert row.quality.mean == pytest.approx(np.mean(finite))
    assert (row.quality.n, row.quality.broken, len(row.seeds)) == (4, 1, 5)
    assert row.others["accuracy"].broken == 1


def test_forgetting_is_averaged_over_finite_values_alone(draw):
    scenario = draw(seeds=2, ranks=(1,), tasks={"clinc": 0.5})
    results = scenario.results()
    place = Place("clinc", "rank 1", "lora")
    hit = next(r for r in results if r.cell.method == "lora" and r.cell.split == "test")
    other = next(
        r for r in results if r.cell.method == "lora" and r.cell.split == "test" and r is not hit
    )
    results[results.index(hit)] = replace(hit, forgetting=replace(hit.forgetting, after=math.nan))
    row = method_row(gather(scenario.spec, results), place)
    assert (row.after.n, row.after.broken, row.before) == (1, 1, pytest.approx(0.84))
    assert row.after.mean == other.forgetting.after


def test_a_method_that_cannot_be_merged_is_told_from_one_that_was_not_measured(draw):
    scenario = draw(ranks=(1,))
    results = scenario.results()
    prompt = Place("clinc", "rank 1", "prompt")
    assert method_row(gather(scenario.spec, results), prompt).unmergeable
    unmeasured = [replace(result, latency=None) for result in results]
    assert not method_row(gather(scenario.spec, unmeasured), prompt).unmergeable


@pytest.mark.parametrize(
    ("share", "exceeds", "misses"),
    [(1.0001, True, False), (1.0, False, False), (0.95, False, False), (0.9499, False, True)],
)
def test_a_budget_is_missed_above_it_or_more_than_five_per_cent_below(
    draw, change, share, exceeds, misses
):
    scenario = draw()
    results = change(scenario.results(), "hybrid", final=share)
    row = method_row(gather(scenario.spec, results), CLINC)
    assert (row.exceeds, row.misses) == (exceeds, misses)


def test_results_of_other_methods_budgets_and_seeds_are_left_out(draw):
    scenario = draw()
    wider = draw(methods=scenario.methods | {"other": 0.0}, ranks=(1, 2, 4, 8), seeds=6)
    expected = gather(scenario.spec, scenario.results())
    found = gather(scenario.spec, wider.results())
    assert {p: method_row(found, p) for p in found.tests} == {
        p: method_row(expected, p) for p in expected.tests
    }
    assert found.strangers == len(wider.results()) - len(scenario.results())


def test_two_results_for_one_seed_are_refused(draw):
    scenario = draw()
    results = scenario.results()
    twin = next(result for result in results if result.cell.split == "test")
    results.append(replace(twin, cell=replace(twin.cell, rate=7e-4)))
    with pytest.raises(RankFlowError, match=r"rates 0\.0007 and 0\.001.*that tuning chose"):
        gather(scenario.spec, results)


def test_the_best_row_has_all_seeds_no_divergence_and_its_budget(draw, change):
    scenario = draw(tasks={"clinc": 0.5}, ranks=(1,))
    spec = scenario.spec

    def best(results):
        gathered = gather(spec, results)
        rows = [method_row(gathered, place) for place in gathered.places("clinc", "rank 1")]
        found = best_row(rows, spec)
        return found and found.place.method

    results = scenario.results()
    assert best(results) == "hybrid"
    assert best(change(results, "hybrid", value=math.nan)) == "dynamic"
    assert best(change(results, "hybrid", final=1.01)) == "dynamic"
    assert best(change(results, "hybrid", status="failed", reason="out of memory")) == "dynamic"
    assert best([]) is None
    for seed, method in enumerate(scenario.methods):
        results = change(results, method, seeds=(seed,), value=math.nan)
    assert best(results) is None


def test_the_best_accuracy_is_the_highest(draw):
    scenario = draw(judge="accuracy", tasks={"clinc": 0.5}, ranks=(1,))
    gathered = gather(scenario.spec, scenario.results())
    rows = [method_row(gathered, place) for place in gathered.places("clinc", "rank 1")]
    best = best_row(rows, scenario.spec)
    assert best is not None
    assert best.quality.mean == max(row.quality.mean for row in rows)


def test_a_control_with_more_budget_is_never_the_best(draw):
    scenario = draw(tasks={"clinc": 0.5}, ranks=(1,))
    variants = {"hybrid": scenario.spec.variants["dynamic"].model_copy(update={"factor": 1.5})}
    spec = scenario.spec.model_copy(update={"variants": variants})
    gathered = gather(spec, scenario.results())
    rows = [method_row(gathered, place) for place in gathered.places("clinc", "rank 1")]
    best = best_row(rows, spec)
    assert best is not None
    assert best.place.method == "dynamic"
