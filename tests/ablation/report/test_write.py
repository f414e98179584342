import io
import math
import random
from dataclasses import replace

import pytest
from rich.console import Console

from rankflow.ablation.report.method import MethodWords
from rankflow.ablation.report.terminal import render_terminal
from rankflow.ablation.report.write import write_report
from rankflow.durable import SUMS_FILE

WORDS = {
    "lora": MethodWords("Low-rank adaptation, PEFT's.", "arXiv 2106.09685", "rank"),
    "hybrid": MethodWords("Dynamic DoRA."),
}


@pytest.fixture
def quick(draw):
    """As small as a report with every part can be."""
    return draw(ranks=(1, 2), tasks={"clinc": 0.5}, seeds=2)


def test_a_report_is_two_files_and_their_figures(quick, tmp_path):
    report = write_report(quick.spec, quick.results(), tmp_path / "out", WORDS)
    text = report.markdown.read_text("utf-8")
    assert report.markdown == tmp_path / "out" / "report.md"
    assert report.html == tmp_path / "out" / "report.html"
    assert report.figures
    for figure in report.figures:
        assert f"(figures/{figure.name})" in text
        assert figure.stat().st_size > 1000
    assert text.count("](figures/") == len(report.figures)


def test_a_report_goes_from_the_verdict_to_how_it_was_run(quick, tmp_path):
    report = write_report(quick.spec, quick.results(), tmp_path, WORDS)
    text = report.markdown.read_text("utf-8")
    sections = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert sections == [
        "Verdict",
        "State of the run",
        "Quality at a glance",
        "Figures",
        "Methods",
        "Paired comparisons",
        "Tuning",
        "How it was run",
    ]
    assert "# Ablation toy\n\nDoes the hybrid pay?" in text
    assert "toy, digest abcdefabcdef." in text
    assert "peft 0.21.0, torch 2.9.1." in text
    assert "f731fd3a9c0e" in text
    assert "**lora.** Low-rank adaptation, PEFT's. (arXiv 2106.09685)" in text
    assert "A variant of hybrid: use\\_dora = False." in text
    assert "2026-01-01" not in text  # when it ended decides nothing


def test_several_tasks_have_a_verdict_each(draw, tmp_path):
    scenario = draw(ranks=(1,), seeds=2)
    text = write_report(scenario.spec, scenario.results(), tmp_path, {}).markdown.read_text("utf-8")
    assert "## Verdict on each task" in text
    assert "### wordnet at rank 1" in text


def test_the_same_results_in_any_order_give_the_same_bytes(quick, change, tmp_path):
    spec, results = quick.spec, change(quick.results(), "dora", value=math.nan)
    first = write_report(spec, results, tmp_path / "a", WORDS)
    shuffled = list(results)
    random.Random(0).shuffle(shuffled)
    second = write_report(spec, shuffled, tmp_path / "b", WORDS)
    assert first.markdown.read_bytes() == second.markdown.read_bytes()
    assert first.html.read_bytes() == second.html.read_bytes()
    assert first.markdown.read_text("utf-8").count("nan") == 0


def test_a_second_report_takes_the_place_of_the_first_and_of_nothing_else(quick, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    write_report(quick.spec, quick.results(), tmp_path, WORDS)
    report = write_report(quick.spec, [], tmp_path, WORDS)
    assert report.figures == ()
    assert [path.name for path in (tmp_path / "figures").iterdir()] == [SUMS_FILE]
    assert "0 of 20 cells finished" in report.markdown.read_text("utf-8")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_results_from_two_machines_are_a_warning(quick, tmp_path):
    results = quick.results()
    other = replace(results[0].provenance, machine="Other CPU", versions={"peft": "0.21.1"})
    results[0] = replace(results[0], provenance=other)
    text = write_report(quick.spec, results, tmp_path, WORDS).markdown.read_text("utf-8")
    assert "Other CPU (1 cell), Some CPU (49 cells)" in text
    assert "peft 0.21.0 or 0.21.1" in text
    assert "come from different machines" in text


def test_the_terminal_shows_the_verdict_and_the_main_table(broken):
    spec, results = broken
    console = Console(file=io.StringIO(), width=200)
    console.print(render_terminal(spec, results))
    text = console.file.getvalue()
    assert "Of 6 comparisons declared" in text
    assert "hybrid has 7.9% lower test NLL than lora" in text
    assert "125 of 150 cells finished" in text
    assert "wordnet, rank 2" in text
    assert "0.463 ± 0.016" in text
    assert "Tuning" not in text
