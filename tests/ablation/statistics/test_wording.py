import math
from dataclasses import replace

import pytest

from rankflow.ablation.statistics.comparison import Comparison
from rankflow.ablation.statistics.verdict import compare_all, sentence

BETTER = Comparison(
    ours="hybrid",
    theirs="lora",
    metric="test NLL",
    relative=True,
    n=20,
    tasks=("x", "y"),
    mean=math.log(0.98),
    low=math.log(0.971),
    high=math.log(0.988),
    p=0.001,
    p_holm=0.004,
    d_z=-1.1,
    p_equivalent=0.9,
    margin=math.log(1.01),
    p_attainable=2**-19,
    p_attainable_holm=2**-17,
    seeds_needed=34,
    broken=0,
    diverged={"hybrid": 0, "lora": 0},
    unpaired=0,
    comparisons=4,
    alpha=0.05,
    outcome="better",
)
NONE = replace(
    BETTER, outcome="no significant difference", high=math.log(1.003), p_holm=0.31, d_z=-0.2
)
FEW = replace(BETTER, outcome="not enough seeds", n=5, p_attainable=2**-4, p_attainable_holm=2**-2)


def test_better_says_by_how_much():
    assert sentence(BETTER) == (
        "hybrid has 2.0% lower test NLL than lora (95% interval 1.2% to 2.9%, p = 0.004 after "
        "Holm, 20 pairs, d_z = 1.1)."
    )


def test_worse_is_called_worse():
    worse = replace(
        BETTER, outcome="worse", mean=math.log(1.02), low=math.log(1.01), high=math.log(1.03)
    )
    assert sentence(replace(worse, p_holm=1e-5, d_z=2.0)) == (
        "hybrid is worse than lora: 2.0% higher test NLL (95% interval 1.0% to 3.0%, p < 0.001 "
        "after Holm, 20 pairs, d_z = 2.0)."
    )


def test_better_within_the_margin_says_that_it_is_small():
    assert sentence(replace(BETTER, p_equivalent=0.01)).endswith(
        "d_z = 1.1), though within the margin of 1.0% declared not to matter."
    )


def test_no_significant_difference_says_what_would_find_it():
    assert sentence(NONE) == (
        "No significant difference in test NLL between hybrid and lora: 2.0% lower (95% interval "
        "-2.9% to +0.3%, p = 0.31 after Holm, 20 pairs, d_z = 0.2); 34 seeds per task would be "
        "needed for 80% power at this effect."
    )
    single = sentence(replace(NONE, tasks=("x",), comparisons=1))
    assert "p = 0.31, 20 pairs" in single
    assert single.endswith("; 34 seeds would be needed for 80% power at this effect.")
    assert sentence(replace(NONE, seeds_needed=None)).endswith(
        "; there is no effect that more seeds could find."
    )


def test_equivalent_names_the_margin():
    equivalent = replace(NONE, outcome="equivalent", mean=math.log(1.0004), p_equivalent=0.02)
    assert sentence(equivalent) == (
        "hybrid and lora are equivalent in test NLL within a margin of 1.0%: 0.04% higher (95% "
        "interval -2.9% to +0.3%, equivalence p = 0.020, 20 pairs)."
    )
    assert ": no difference (95%" in sentence(replace(equivalent, mean=0.0))


def test_not_enough_seeds_names_the_limit():
    assert sentence(FEW) == (
        "Not enough seeds to tell hybrid from lora in test NLL: with 5 pairs p cannot fall below "
        "0.062, 0.25 after Holm, and 8 pairs are the fewest that always could reach 0.05; "
        "measured: 2.0% lower."
    )
    assert "with 1 pair p cannot fall below 1, " in sentence(replace(FEW, n=1, p_attainable=1.0))
    lost = replace(FEW, n=0, mean=math.nan, broken=8, diverged={"hybrid": 8, "lora": 0})
    assert sentence(lost) == (
        "Not enough seeds to tell hybrid from lora in test NLL: no pair finished; hybrid diverged "
        "in 8 of 8 pairs."
    )


def test_what_diverged_is_named_in_every_verdict():
    lost = {"broken": 3, "diverged": {"hybrid": 3, "lora": 1}, "unpaired": 2}
    tail = "; hybrid diverged in 3 of 23 pairs; lora diverged in 1 of 23 pairs; 2 measured by one"
    for outcome in ("worse", "no significant difference", "diverged"):
        assert tail in sentence(replace(BETTER, outcome=outcome, **lost))
    assert sentence(replace(BETTER, outcome="diverged")).startswith(
        "No verdict on hybrid and lora in test NLL, because pairs are missing: 2.0% lower in "
    )


def test_plain_differences_keep_their_unit():
    plain = replace(BETTER, relative=False, metric="accuracy", mean=0.0123, low=0.01, high=0.0146)
    assert sentence(plain).startswith(
        "hybrid has 0.0123 higher accuracy than lora (95% interval 0.01 to 0.0146, "
    )


@pytest.mark.parametrize("alpha", [0.1, 0.005])
def test_the_confidence_is_that_of_the_level(alpha):
    assert f"({100 * (1 - alpha):g}% interval" in sentence(replace(NONE, alpha=alpha))


def test_a_table_becomes_a_sentence(make_table):
    scores = {"ours": {"x": [0.9, 0.92, 0.9, 0.91, 0.9, 0.88]}, "theirs": {"x": [1.0] * 6}}
    (found,) = compare_all(make_table(scores, relative=True), [("ours", "theirs")], margin=0.01)
    assert sentence(found).startswith("ours has 9.8% lower test NLL than theirs (95% interval ")
