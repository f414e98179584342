import math

import numpy as np
import pytest

from rankflow.ablation.report.document import Bullets, Heading, Paragraph
from rankflow.ablation.report.rows import gather, method_row
from rankflow.ablation.report.troubles import progress
from rankflow.ablation.report.verdict_text import (
    task_verdict_blocks,
    trouble_blocks,
    verdict_blocks,
)
from rankflow.ablation.report.verdicts import judge
from rankflow.ablation.statistics.verdict import sentence


def texts(blocks):
    lines = []
    for block in blocks:
        match block:
            case Heading(_, text):
                lines.append(text)
            case Paragraph(text, lead):
                lines.append(f"{lead} {text}".strip())
            case Bullets(items):
                lines += texts(items)
    return lines


def said(spec, results):
    gathered = gather(spec, results)
    verdicts = [judge(gathered, budget.label) for budget in spec.budgets]
    return texts(verdict_blocks(gathered, verdicts))


def troubles(spec, results):
    gathered = gather(spec, results)
    rows = [method_row(gathered, place) for place in gathered.tests]
    return texts(trouble_blocks(gathered, rows))


def test_comparisons_pair_by_task_and_seed_over_all_tasks(draw):
    scenario = draw()
    results = scenario.results()
    found = judge(gather(scenario.spec, results), "rank 2").comparisons[0]
    scores = {
        (r.cell.method, r.cell.task, r.cell.seed): r.metrics["nll"]
        for r in results
        if r.cell.split == "test" and r.cell.budget == "rank 2"
    }
    logs = [
        math.log(scores["hybrid", task, seed] / scores["lora", task, seed])
        for task in scenario.tasks
        for seed in range(5)
    ]
    assert (found.ours, found.theirs, found.n) == ("hybrid", "lora", 10)
    assert found.mean == pytest.approx(np.mean(logs), rel=1e-12)
    assert found.comparisons == 2  # Holm counts those of one budget
    assert found.outcome == "better"


def test_a_task_alone_has_its_own_pairs(draw):
    scenario = draw()
    verdict = judge(gather(scenario.spec, scenario.results()), "rank 2", "clinc")
    assert [(found.n, found.tasks) for found in verdict.comparisons] == [(5, ("clinc",))] * 2


def test_shares_are_compared_by_difference(draw):
    excess = draw(judge="excess", tasks={"planted": 0.5}, ranks=(1,))
    verdict = judge(gather(excess.spec, excess.results()), "rank 1")
    assert not verdict.relative
    assert verdict.comparisons[0].margin == 0.01
    scenario = draw(judge="accuracy", seeds=8)
    verdict = judge(gather(scenario.spec, scenario.results()), "rank 1")
    assert not verdict.relative
    assert verdict.comparisons[0].margin == 0.01
    assert verdict.comparisons[0].mean > 0
    assert verdict.comparisons[0].outcome == "better"


def test_scores_that_are_not_positive_are_compared_by_difference(draw, change):
    scenario = draw(tasks={"easy": 0.5}, ranks=(1,))
    results = change(scenario.results(), "hybrid", value=0.0)
    verdict = judge(gather(scenario.spec, results), "rank 1")
    values = [r.metrics["nll"] for r in results if r.cell.split == "test"]
    assert not verdict.relative
    assert verdict.comparisons[0].margin == pytest.approx(0.01 * np.mean(values))


def test_every_comparison_has_the_sentence_of_the_statistics(draw):
    scenario = draw()
    gathered = gather(scenario.spec, scenario.results())
    lines = said(scenario.spec, scenario.results())
    for budget in scenario.spec.budgets:
        for found in judge(gathered, budget.label).comparisons:
            assert sentence(found) in lines
    assert lines[1] == "Of 6 comparisons declared, counted at each budget: 6 better."


def test_it_says_that_ours_is_worse(draw):
    scenario = draw(
        methods={"lora": 0.0, "hybrid": 0.1}, compare=(("hybrid", "lora"),), interaction=None
    )
    lines = said(scenario.spec, scenario.results())
    assert "3 worse" in lines[1]
    assert sum("hybrid is worse than lora" in line for line in lines) == 3


def test_it_says_that_there_is_no_significant_difference(draw):
    scenario = draw(
        methods={"lora": 0.0, "hybrid": 0.0},
        compare=(("hybrid", "lora"),),
        interaction=None,
        noise=0.1,
        seeds=8,
        ranks=(1,),
    )
    lines = said(scenario.spec, scenario.results())
    assert any(line.startswith("No significant difference in test NLL") for line in lines)


def test_too_few_seeds_are_a_warning_with_the_seeds_that_are_needed(draw):
    scenario = draw(seeds=2)
    lines = said(scenario.spec, scenario.results())
    warnings = [line for line in lines if line.startswith("Warning.")]
    assert len(warnings) == 3
    assert "2 of 2 comparisons have too few pairs" in warnings[0]
    assert "4 where 7 are needed. Run at least 4 seeds on each task." in warnings[0]
    assert not any("better" in line for line in lines[3:] if "worth" not in line)
    enough = said(scenario.spec, draw(seeds=4).results())
    assert [line for line in enough if line.startswith("Warning.")] == warnings  # seeds of the spec
    assert not any(
        w.startswith("Warning.") for w in said(draw(seeds=4).spec, draw(seeds=4).results())
    )


def test_the_interaction_is_named_by_its_parts_and_direction(draw):
    scenario = draw()
    lines = [line for line in said(scenario.spec, scenario.results()) if "Interaction" in line]
    assert len(lines) == 3
    assert all(
        "Interaction of hybrid (together), dora and dynamic (alone) over lora: the two are worth "
        "more together" in line
        for line in lines
    )
    opposed = draw(methods={"lora": 0.0, "dora": -0.1, "dynamic": -0.1, "hybrid": -0.1})
    lines = said(opposed.spec, opposed.results())
    assert sum("worth less together" in line for line in lines) == 3
    additive = draw(methods={"lora": 0.0, "dora": -0.1, "dynamic": -0.1, "hybrid": -0.2})
    lines = said(additive.spec, additive.results())
    assert sum("no significant interaction" in line for line in lines) == 3
    few = draw(seeds=1)
    lines = said(few.spec, few.results())
    assert sum("not enough seeds to tell (2 of at least 6 contrasts)" in x for x in lines) == 3


def test_the_interaction_of_accuracies_has_the_other_direction(draw):
    scenario = draw(judge="accuracy", seeds=8)
    lines = said(scenario.spec, scenario.results())
    assert sum("worth more together" in line for line in lines) == 3


def test_a_comparison_without_a_shared_seed_is_named_as_not_measured(draw):
    scenario = draw()
    results = [r for r in scenario.results() if r.cell.method != "dora"]
    lines = said(scenario.spec, results)
    assert "3 not measured" in lines[1]
    assert sum(line.startswith("Not measured. hybrid with dora") for line in lines) == 3
    assert sum(line.startswith("Not measured. the interaction") for line in lines) == 3


def test_no_results_at_all_are_no_error(draw):
    scenario = draw()
    assert "6 not measured" in said(scenario.spec, [])[1]
    assert any("0 of 150 cells finished" in line for line in troubles(scenario.spec, []))


def test_without_comparisons_there_is_nothing_to_judge(draw):
    scenario = draw(compare=(), interaction=None)
    lines = said(scenario.spec, scenario.results())
    assert lines == ["Verdict", "No comparison was declared, so there is nothing to judge."]
    gathered = gather(scenario.spec, scenario.results())
    verdict = judge(gathered, "rank 1", "clinc")
    assert task_verdict_blocks(gathered, [verdict]) == []


def test_cells_are_counted(broken, draw):
    spec, results = broken
    found = progress(gather(spec, results))
    assert (found.asked, found.done, found.failed, found.unsupported) == (150, 125, 2, 15)
    assert found.missing == {"hybrid": 8}
    whole = draw()
    found = progress(gather(whole.spec, whole.results()))
    assert (found.asked, found.done, found.missing) == (150, 150, {})


def test_a_method_found_unsupported_while_tuning_is_not_missing(draw, change):
    scenario = draw(tasks={"clinc": 0.5}, ranks=(1,))
    results = [
        r for r in scenario.results() if r.cell.method != "prompt" or r.cell.split == "validation"
    ]
    unsupported = [
        type(r)(r.cell, "unsupported", r.provenance, reason="no such layer.")
        if r.cell.method == "prompt"
        else r
        for r in results
    ]
    found = progress(gather(scenario.spec, unsupported))
    assert (found.unsupported, found.missing) == (5, {})
    lines = troubles(scenario.spec, unsupported)
    assert any(
        line.startswith("Unsupported. prompt, 3 cells (clinc, rank 1, tuning at 0.0005, seed 100;")
        and line.endswith("): no such layer.")
        for line in lines
    )


def test_what_broke_is_listed_with_its_reason(broken):
    spec, results = broken
    lines = troubles(spec, results)
    assert lines[1] == (
        "Not finished: these results are preliminary. 125 of 150 cells finished, 2 failed, 15 are "
        "of methods that cannot run, 8 have not run (hybrid 8)."
    )
    assert (
        "Failed. lora, 2 cells (clinc, rank 4, seed 4; wordnet, rank 4, seed 4): CUDA out of "
        "memory." in lines
    )
    assert any(x.startswith("Unsupported. prompt, 15 cells (wordnet, rank 1, seeds") for x in lines)
    assert "Diverged. dora, 1 cell (clinc, rank 1, seed 1)." in lines
    assert any(
        x.startswith("Diverged. dynamic, 4 cells (clinc, rank 2, seeds 2, 3;") for x in lines
    )
    assert (
        "Off budget. dora ended at 99.0% to 102.0% (clinc, rank 2), 99.0% to 102.0% (wordnet, rank "
        "2)." in lines
    )
    assert "Off budget. prompt ended at 70.0% (clinc, rank 2)." in lines
    assert any(x.startswith("Peak:") and "dynamic 150%, hybrid 150%" in x for x in lines)


def test_a_divergence_is_in_the_sentence_of_its_comparison(broken):
    spec, results = broken
    lines = said(spec, results)
    assert any("dora diverged in 1 of 10 pairs" in line for line in lines)


def test_a_single_seed_is_pointed_out(draw):
    scenario = draw(seeds=1)
    assert any(x.startswith("Single seed:") for x in troubles(scenario.spec, scenario.results()))
    scenario = draw(seeds=2)
    assert not any(
        x.startswith("Single seed:") for x in troubles(scenario.spec, scenario.results())
    )
