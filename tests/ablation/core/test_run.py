"""What runs, in what order, and that it comes out the same however often it is stopped."""

import io
import math
from dataclasses import replace

import pytest
from rich.console import Console

from rankflow.ablation.provenance import digest_cell
from rankflow.ablation.records import Cell, Place
from rankflow.ablation.run import run_ablation
from rankflow.errors import RankFlowError, SpecError


class Scripted:
    """An executor whose results are a function of the order; it stops after some cells."""

    def __init__(self, spec, result_of, stop_after=math.inf, workers=1):
        self._make = lambda cell: result_of(cell, digest_cell(spec, cell), metrics=loss_of(cell))
        self._left, self._workers = stop_after, workers
        self.orders, self.started, self.closed = [], [], False

    @property
    def free(self):
        return self._workers - len(self.orders)

    def start(self, order):
        assert self.free > 0
        self.orders.append(order)
        self.started.append(order)

    def collect(self):
        if self._left == 0:
            raise KeyboardInterrupt
        self._left -= 1
        order = self.orders.pop()  # the youngest first: cells end in any order
        return [(order, self.outcome(order.cell))]

    def outcome(self, cell):
        return self._make(cell)

    def close(self):
        self.closed = True


def loss_of(cell):
    best = {"lora": 0.005, "hybrid": 0.08}.get(cell.method, 0.02)
    return {"excess": 1 + math.log2(cell.rate / best) ** 2 + 0.01 * cell.seed}


def silent():
    return Console(file=io.StringIO(), width=200)


@pytest.fixture
def spec(planted):
    return planted("tuning.widest=16")


@pytest.fixture
def whole(spec, ablation_in, result_of):
    """The results of a run that nobody stopped."""
    ablation = ablation_in(spec, "whole")
    run_ablation(ablation, Scripted(spec, result_of), silent())
    return ablation.results


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("stop", [0, 1, 4, 9, 17])
def test_a_run_that_is_killed_goes_on_to_the_same_results(
    spec, ablation_in, result_of, whole, measured, stop, workers
):
    executor = Scripted(spec, result_of, stop, workers)
    with pytest.raises(KeyboardInterrupt):
        run_ablation(ablation_in(spec), executor, silent())
    assert executor.closed
    again = ablation_in(spec)
    assert len(again.results) == stop
    second = Scripted(spec, result_of, workers=workers)
    run_ablation(again, second, silent())
    assert len(second.started) == len(whole) - stop  # nothing twice
    assert again.results.keys() == whole.keys()
    assert measured(again.reported()) == measured(ablation_in(spec, "whole").reported())


def test_a_follower_gets_the_ranks_of_its_seed_and_one_seed_is_measured(
    spec, ablation_in, result_of
):
    executor = Scripted(spec, result_of)
    run_ablation(ablation_in(spec), executor, silent())
    for order in executor.started:
        assert (order.learned is not None) == (order.cell.method == "frozen-pattern")
        assert order.is_measured == (order.cell.split == "test" and order.cell.seed == 0)


def test_a_cell_that_raises_is_reported_and_the_others_go_on(spec, ablation_in, result_of):
    class Breaking(Scripted):
        def outcome(self, cell):
            broken = (cell.method, cell.split, cell.seed) == ("lora", "test", 1)
            return RankFlowError("[/bold] it broke [red") if broken else super().outcome(cell)

    ablation, console = ablation_in(spec), silent()
    run_ablation(ablation, Breaking(spec, result_of), console)
    assert "[/bold] it broke [red" in console.file.getvalue()  # no markup of ours
    failed = [r for r in ablation.results.values() if r.status == "failed"]
    assert [r.reason for r in failed] == ["RankFlowError: [/bold] it broke [red"]
    assert failed[0] in ablation.reported()
    assert not ablation_in(spec).ready()  # it is not tried again ...
    (cell,) = ablation_in(spec, retry=True).ready()  # ... unless asked for
    assert cell == failed[0].cell


def test_results_of_another_task_or_method_are_not_taken(planted, ablation_in, result_of):
    run_ablation(ablation_in(planted()), Scripted(planted(), result_of), silent())
    assert ablation_in(planted()).results
    assert not ablation_in(planted("train.max_steps=4")).results
    changed = ablation_in(planted('method.hybrid={ like = "hybrid", budget = { recycle = 0.5 } }'))
    assert {cell.method for cell in changed.results} == {"lora"}


def test_seeds_that_are_not_asked_for_are_not_taken(planted, ablation_in, result_of):
    run_ablation(ablation_in(planted("seeds=4")), Scripted(planted(), result_of), silent())
    found = ablation_in(planted()).results
    assert {cell.seed for cell in found if cell.split == "test"} == {0, 1}
    other = ablation_in(planted("tuning.seeds=[7]")).results
    assert {cell.split for cell in other} == {"test"}


def test_tuning_that_failed_does_not_count_where_nothing_is_tuned(planted, ablation_in, result_of):
    spec = planted()
    ablation = ablation_in(spec)
    cell = Cell("planted", "rank 2", "lora", "validation", 100, 0.02)
    ablation.store.save(result_of(cell, digest_cell(spec, cell), status="failed"))
    place = Place("planted", "rank 2", "lora")
    assert not any(c.method == "lora" for c in ablation_in(spec).ready())
    untuned = ablation_in(planted("tuning.enabled=false"))
    assert any(c.method == "lora" for c in untuned.ready()), place


def test_only_the_groups_that_are_asked_for_run(spec, ablation_in, result_of):
    ablation = ablation_in(spec, only="rank 2/(lora|frozen)")
    run_ablation(ablation, Scripted(spec, result_of), silent())
    assert {cell.method for cell in ablation.results} == {"lora"}
    assert ablation.ended() == ablation.expected() - ablation._expected_of(ablation.places[1])
    assert "retrains the ranks of 'hybrid'" in ablation.obstacles()[ablation.places[1]]


def test_what_is_expected_is_exact_once_all_has_run(spec, ablation_in, result_of):
    ablation = ablation_in(spec)
    before = ablation.expected()
    run_ablation(ablation, Scripted(spec, result_of), silent())
    assert ablation.expected() == ablation.ended() == len(ablation.results)
    assert before == 3 * (4 + 2)
    assert not ablation.obstacles()


def test_only_points_that_tuning_chose_are_reported(spec, ablation_in, result_of):
    ablation = ablation_in(spec)
    run_ablation(ablation, Scripted(spec, result_of), silent())
    cell = next(c for c in ablation.results if c.split == "test" and c.method == "lora")
    stale = replace(cell, rate=0.02)  # of an earlier tuning
    ablation.keep(ablation.order(stale), result_of(stale, digest_cell(spec, stale)))
    reported = {r.cell for r in ablation.reported()}
    assert cell in reported
    assert stale in ablation.results
    assert stale not in reported


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (['methods=["lora", "lroa"]'], "no method is called 'lroa'; did you mean 'lora'?"),
        (['methods=["frozen-pattern"]'], "retrains the ranks of 'hybrid', which is not run"),
        (
            ['method.lora={ like = "oft", factor = 2.0 }'],
            "{'factor': 2.0}: 'oft' has no RankFlow budget",
        ),
        (['method.lora={ like = "oft", use_dora = false }'], "'oft' has no RankFlow budget"),
        (['method.lora={ like = "lora", config = { r = 3 } }'], "is steered by a budget"),
        (['method.lora={ like = "hybrid", budget = { polcy = "x" } }'], "did you mean 'policy'?"),
        (
            ['method.lora={ like = "lora", follows = "lora" }'],
            "retrains its own ranks, by lora",
        ),
    ],
)
def test_methods_are_checked_before_anything_runs(planted, ablation_in, overrides, expected):
    with pytest.raises(SpecError) as caught:
        ablation_in(planted("compare=[]", *overrides))
    assert expected in str(caught.value)


def test_all_faults_of_methods_are_told_at_once(planted, ablation_in):
    with pytest.raises(SpecError, match="2 faults"):
        ablation_in(planted("compare=[]", 'methods=["lroa", "frozen-pattern"]'))


def test_what_is_asked_for_must_be_a_pattern_that_matches(spec, ablation_in):
    with pytest.raises(SpecError, match="no regular expression"):
        ablation_in(spec, only="(")
    with pytest.raises(SpecError, match="the first of them is planted/rank 2/lora"):
        ablation_in(spec, only="rank 4")
