import math

import numpy as np
import pytest

from rankflow.ablation.statistics.table import ScoreTable
from rankflow.errors import RankFlowError

NAN = math.nan


def test_scores_are_paired_by_task_and_seed_whatever_their_order(make_table):
    scores = {"a": {"x": [1.0, 2.0], "y": [3.0]}, "b": {"y": [30.0], "x": [10.0, 20.0]}}
    table = make_table(scores)
    shuffled = ScoreTable(dict(reversed(table.values.items())), "test NLL")
    for each in (table, shuffled):
        pairs = each.pairs("a", "b")
        assert pairs.difference.tolist() == [-9, -18, -27]
        assert pairs.task.tolist() == ["x", "x", "y"]
        assert pairs.seed.tolist() == [0, 1, 0]
        assert (len(pairs), pairs.broken, pairs.unpaired) == (3, 0, 0)


def test_relative_differences_are_log_ratios(make_table):
    table = make_table({"a": {"x": [1.02], "y": [51.0]}, "b": {"x": [1.0], "y": [50.0]}})
    assert table.pairs("a", "b").difference == pytest.approx([0.02, 1.0])
    relative = ScoreTable(table.values, "test NLL", relative=True)
    assert relative.pairs("a", "b").difference == pytest.approx(np.log([1.02, 1.02]))


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
@pytest.mark.parametrize("relative", [False, True])
def test_a_diverged_cell_is_counted_against_its_method(make_table, bad, relative):
    table = make_table(
        {"a": {"x": [1.0, bad, bad, 1.0]}, "b": {"x": [2.0, 2.0, bad, 2.0]}}, relative=relative
    )
    pairs = table.pairs("a", "b")
    assert pairs.seed.tolist() == [0, 3]
    assert np.isfinite(pairs.difference).all()
    assert pairs.broken == 2
    assert pairs.diverged == {"a": 2, "b": 1}


def test_a_cell_without_a_partner_is_counted(make_table):
    table = make_table({"a": {"x": [1.0, None, 1.0]}, "b": {"x": [2.0, 2.0, None], "y": [2.0]}})
    pairs = table.pairs("a", "b")
    assert (pairs.seed.tolist(), pairs.unpaired, pairs.broken) == ([0], 3, 0)


def test_no_pair_may_be_left(make_table):
    pairs = make_table({"a": {"x": [NAN]}, "b": {"x": [1.0]}}).pairs("a", "b")
    assert (len(pairs), pairs.broken) == (0, 1)


def test_a_contrast_is_the_weighted_sum_of_scores(make_table):
    scores = {"a": {"x": [8.0]}, "b": {"x": [4.0]}, "c": {"x": [2.0]}}
    weights = {"a": 1, "b": -2, "c": 3}
    assert make_table(scores).contrast(weights).difference.tolist() == [6]
    found = make_table(scores, relative=True).contrast(weights).difference
    assert found == pytest.approx([math.log(8 / 4**2 * 2**3)])


def test_an_unknown_method_is_named_with_the_closest_one(make_table):
    table = make_table({"hybrid": {"x": [1.0]}, "lora": {"x": [1.0]}})
    with pytest.raises(RankFlowError, match=r"no method 'hybird'.*mean 'hybrid'.*'lora'"):
        table.pairs("hybird", "lora")
    with pytest.raises(RankFlowError, match="no method 'a'; it is empty"):
        ScoreTable({}, "test NLL").pairs("a", "b")


def test_methods_without_a_common_cell_cannot_be_paired(make_table):
    table = make_table({"a": {"x": [1.0]}, "b": {"y": [1.0], "x": [None, 1.0]}})
    with pytest.raises(RankFlowError, match=r"'a', 'b' share no task and seed.*same seeds"):
        table.pairs("a", "b")


def test_a_method_is_not_compared_with_itself(make_table):
    with pytest.raises(RankFlowError, match="'a' twice"):
        make_table({"a": {"x": [1.0]}}).pairs("a", "a")


def test_ratios_need_positive_scores(make_table):
    scores = {"a": {"x": [1.0, 0.0, NAN]}, "b": {"x": [-2.0] * 6}}
    with pytest.raises(RankFlowError, match=r"a/x/1 = 0.0, b/x/0 = -2.0.* and 2 more; .*False"):
        make_table(scores, relative=True)
    assert make_table(scores).pairs("a", "b").difference.tolist() == [3, 2]
