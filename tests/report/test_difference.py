from dataclasses import replace

from rankflow.report.difference import Allocation, Difference, allocation_after, find_difference

A = Allocation({"q": 4, "k": 2, "v": 0}, frozenset({"q", "k"}), 600)
B = Allocation({"k": 5, "q": 4, "head": 1}, frozenset({"k", "q", "head"}), 700)


def test_sites_of_both_are_subtracted_and_the_others_named():
    found = find_difference(A, B)
    assert found.ranks == {"q": 0, "k": 3}
    assert (found.only_a, found.only_b) == ({"v": 0}, {"head": 1})
    assert found.sites == ["q", "k", "v", "head"]
    assert found.largest == 3


def test_the_other_way_round_every_sign_is_turned():
    there = find_difference(A, replace(B, magnitudes=frozenset({"q"})))
    back = find_difference(replace(B, magnitudes=frozenset({"q"})), A)
    assert back.ranks == {site: -change for site, change in there.ranks.items()}
    assert (back.only_a, back.only_b) == (there.only_b, there.only_a)
    assert (there.gained, there.lost) == (frozenset(), {"k"})
    assert (back.gained, back.lost) == (there.lost, there.gained)


def test_a_magnitude_of_an_unshared_site_is_neither_gained_nor_lost():
    found = find_difference(A, B)
    assert found.gained == found.lost == frozenset()


def test_without_a_difference_the_scale_still_has_a_length():
    assert find_difference(A, A).largest == 1
    assert Difference({}, {"q": 3}, {}, frozenset(), frozenset()).largest == 1


def test_an_event_leaves_its_ranks_and_the_magnitudes_that_it_trains(event):
    on = dict(zip(event.ranks, (True, False, True), strict=True))
    left = allocation_after(replace(event, magnitudes=on))
    assert left == Allocation(event.ranks, frozenset(site for site in on if on[site]), event.spent)


def test_magnitudes_outside_of_the_budget_are_told_by_their_change(event):
    query, value, _ = event.ranks
    always = replace(event, magnitude_change={query: 0.1, value: 0.0})
    assert allocation_after(always).magnitudes == {query, value}
    assert allocation_after(event).magnitudes == frozenset()
