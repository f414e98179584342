import math
from dataclasses import asdict

import numpy as np
import pytest

from rankflow.ablation.statistics.intervals import bootstrap_interval, student_interval
from rankflow.ablation.statistics.table import ScoreTable
from rankflow.ablation.statistics.verdict import compare_all
from rankflow.errors import RankFlowError


def _row(center, noise, seeds, seed=0):
    return (center + noise * np.random.default_rng(seed).standard_normal(seeds)).tolist()


def _two(ours, theirs):
    return {"ours": {"x": ours}, "theirs": {"x": theirs}}


def _verdict(table, margin=0.01, **settings):
    (found,) = compare_all(table, [("ours", "theirs")], margin=margin, **settings)
    return found


REFERENCE = _row(1, 0.01, 10)


@pytest.mark.parametrize(("shift", "lower"), [(-0.1, "better"), (0.1, "worse")])
@pytest.mark.parametrize("relative", [False, True])
def test_a_clear_difference_is_better_or_worse_by_the_metrics_direction(
    make_table, shift, lower, relative
):
    scores = _two(_row(1 + shift, 0.01, 10, seed=1), REFERENCE)
    assert _verdict(make_table(scores, relative=relative)).outcome == lower
    other = {"better": "worse", "worse": "better"}[lower]
    accuracy = make_table(scores, relative=relative, higher_is_better=True)
    assert _verdict(accuracy).outcome == other


def test_a_verdict_holds_the_figures_it_rests_on(make_table):
    table = make_table(_two(_row(0.9, 0.01, 10, seed=1), REFERENCE))
    found = _verdict(table)
    pairs = table.pairs("ours", "theirs")
    assert found.mean == pytest.approx(pairs.difference.mean())
    assert (found.low, found.high) == bootstrap_interval(pairs)
    assert found.p == found.p_holm == found.p_attainable == 2 / 2**10
    assert (found.n, found.tasks, found.broken, found.unpaired) == (10, ("x",), 0, 0)
    assert found.seeds_needed == 6  # the fewest that can be significant
    assert _verdict(table, kind="student").low == student_interval(pairs)[0]
    assert asdict(found)["outcome"] == "better"


def test_a_small_difference_is_equivalent_only_within_a_margin_that_holds_it(make_table):
    table = make_table(_two(_row(1, 0.01, 10, seed=1), REFERENCE))
    assert _verdict(table, margin=0.05).outcome == "equivalent"
    tight = _verdict(table, margin=0.001)
    assert tight.outcome == "no significant difference"
    assert tight.p_equivalent > 0.05


def test_better_and_within_the_margin_is_better(make_table):
    found = _verdict(make_table(_two(_row(0.97, 0.01, 10, seed=1), REFERENCE)), margin=0.5)
    assert (found.outcome, found.p_equivalent < 0.05) == ("better", True)


@pytest.mark.parametrize("shift", [-0.5, 0.0])
def test_five_pairs_are_not_enough_for_any_verdict(make_table, shift):
    scores = _two(_row(1 + shift, 0.01, 5, seed=1), REFERENCE[:5])
    assert _verdict(make_table(scores), margin=1.0).outcome == "not enough seeds"
    six = _two(_row(1 + shift, 0.01, 6, seed=1), REFERENCE[:6])
    assert _verdict(make_table(six), margin=1.0).outcome == ("better" if shift else "equivalent")


def test_holm_decides_over_all_comparisons(make_table):
    scores = {"theirs": {"x": _row(1, 0.01, 7)}}
    for i in range(4):
        scores[f"m{i}"] = {"x": _row(0.9, 0.01, 7, seed=1 + i)}
    table = make_table(scores)
    declared = [(f"m{i}", "theirs") for i in range(4)]
    # 2 / 2^7 times 3 is below 0.05, times 4 it is not.
    three = compare_all(table, declared[:3], margin=0.01)
    assert [c.outcome for c in three] == ["better"] * 3
    assert [c.p_holm for c in three] == [3 * 2 / 2**7] * 3
    four = compare_all(table, declared, margin=0.01)
    assert [c.outcome for c in four] == ["not enough seeds"] * 4
    assert [c.p_attainable_holm for c in four] == [4 * 2 / 2**7] * 4
    assert [c.p for c in four] == [2 / 2**7] * 4


def test_holms_steps_leave_room_where_other_comparisons_are_clear(make_table):
    scores = {
        "theirs": {"x": _row(1, 0.01, 12)},
        "clear": {"x": _row(0.9, 0.01, 12, seed=1)},
        "short": {"x": _row(0.9, 0.01, 6, seed=2)},
    }
    clear, short = compare_all(
        make_table(scores), [("clear", "theirs"), ("short", "theirs")], margin=0.01
    )
    assert (clear.outcome, short.outcome) == ("better", "better")
    assert short.p_holm == 2 / 2**6
    assert short.unpaired == 6


@pytest.mark.parametrize("higher_is_better", [False, True])
@pytest.mark.parametrize("shift", [-0.1, 0.1])
@pytest.mark.parametrize("broken", ["ours", "theirs"])
def test_no_method_wins_that_diverged_in_some_pairs(make_table, broken, shift, higher_is_better):
    scores = _two(_row(1 + shift, 0.01, 10, seed=1), list(REFERENCE))
    scores[broken]["x"][3] = math.nan
    found = _verdict(make_table(scores, higher_is_better=higher_is_better))
    winner = "ours" if (shift > 0) == higher_is_better else "theirs"
    expected = {"ours": "better", "theirs": "worse"}[winner]
    assert found.outcome == ("diverged" if winner == broken else expected)
    assert (found.n, found.broken, found.diverged[broken]) == (9, 1, 1)


@pytest.mark.parametrize("broken", ["ours", "theirs"])
def test_methods_are_not_equivalent_where_one_diverged(make_table, broken):
    scores = _two(_row(1, 0.01, 10, seed=1), list(REFERENCE))
    scores[broken]["x"][3] = math.inf
    assert _verdict(make_table(scores), margin=0.05).outcome == "diverged"


def test_nothing_finished_is_not_enough(make_table):
    found = _verdict(make_table(_two([math.nan] * 8, REFERENCE[:8])))
    assert (found.outcome, found.n, found.broken, found.p) == ("not enough seeds", 0, 8, 1)
    assert math.isnan(found.mean)
    assert found.seeds_needed is None


def test_seeds_needed_are_for_each_task(make_table):
    one = {"ours": {}, "theirs": {}}
    for t, task in enumerate("xyz"):
        one["ours"][task] = _row(1.001, 0.01, 10, seed=10 + t)
        one["theirs"][task] = _row(1, 0.01, 10, seed=20 + t)
    found = _verdict(make_table(one), margin=0.001)
    sample = make_table(one).pairs("ours", "theirs").difference
    effect = sample.mean() / sample.std(ddof=1)
    # Normal approximation, ((1.96 + 0.84) / d_z)^2 pairs, a few pairs short of the t test's.
    assert found.seeds_needed == pytest.approx((2.8 / effect) ** 2 / 3, rel=0.05, abs=1)
    # At a quarter of the level 1.96 becomes 2.50.
    one["third"] = one["theirs"]
    declared = [("ours", "theirs"), ("ours", "third"), ("theirs", "ours"), ("third", "ours")]
    four = compare_all(make_table(one), declared, margin=0.001)[0]
    assert four.seeds_needed == pytest.approx((3.34 / effect) ** 2 / 3, rel=0.05, abs=1)


def test_a_method_that_is_another_under_a_second_name_is_equivalent(make_table):
    found = _verdict(make_table(_two(REFERENCE, REFERENCE)))
    assert (found.mean, found.p, found.d_z, found.seeds_needed) == (0, 1, 0, None)
    assert found.outcome == "equivalent"


@pytest.mark.parametrize("kind", ["student", "bootstrap"])
def test_verdicts_do_not_depend_on_the_order_of_cells_or_the_run(make_table, kind):
    table = make_table(_two(_row(0.99, 0.02, 45, seed=1), _row(1, 0.02, 45)))
    shuffled = ScoreTable(dict(reversed(table.values.items())), table.metric)
    first, again, other = (_verdict(t, kind=kind, seed=7) for t in (table, table, shuffled))
    assert first == again == other


def test_what_makes_no_sense_is_refused(make_table):
    table = make_table(_two(REFERENCE, REFERENCE))
    with pytest.raises(RankFlowError, match=r"margin .* got 0"):
        _verdict(table, margin=0)
    with pytest.raises(RankFlowError, match="got 5"):
        _verdict(table, alpha=5)
    with pytest.raises(RankFlowError, match="mean 'theirs'"):
        compare_all(table, [("ours", "their")], margin=0.1)
    assert compare_all(table, [], margin=0.1) == []
