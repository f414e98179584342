from dataclasses import replace

from rankflow.report.summary import describe_event


def test_an_event_is_described_in_one_line(event):
    assert describe_event(event) == (
        "step 120  budget 165,888 -> spent 165,120  ranks 0-6 (mean 2.7)  pruned 3, born 1"
    )


def test_magnitudes_are_counted_where_the_budget_covers_them(event):
    covered = replace(event, magnitudes={"q": True, "k": False, "v": True})
    assert "(mean 2.7)  magnitudes 2 of 3  pruned 3" in describe_event(covered)
