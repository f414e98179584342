import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankflow.allocation.demand import estimate_demand, price_by_gradient


def estimate(scores, mature=None, remembered=None):
    """Estimate for one list of scores a site; everything is mature unless said otherwise."""
    flat = np.array([score for of_site in scores for score in of_site], dtype=float)
    return estimate_demand(
        np.array([len(of_site) for of_site in scores]),
        flat,
        np.ones(len(flat), bool) if mature is None else np.array(mature, bool),
        np.zeros(len(scores)) if remembered is None else np.array(remembered, dtype=float),
    )


def test_a_site_promises_what_its_weakest_component_earns():
    assert estimate([[5.0, 3.0, 4.0], [0.5]]).tolist() == [3.0, 0.5]


def test_a_site_promises_nothing_while_one_of_its_components_is_young():
    promised = estimate([[5.0, 3.0], [2.0]], mature=[True, False, True], remembered=[7.0, 7.0])
    assert promised.tolist() == [0.0, 2.0]


def test_a_dead_site_promises_what_is_remembered_of_it():
    assert estimate([[], [1.0], []], remembered=[0.25, 9.0, 4.0]).tolist() == [0.25, 1.0, 4.0]


def test_a_dead_site_keeps_its_promise_from_event_to_event():
    promised = estimate([[3.0, 2.0]])
    for _ in range(3):
        promised = estimate([[]], remembered=promised)
    assert promised.tolist() == [2.0]


def test_a_model_without_components_promises_what_is_remembered():
    assert estimate([[], []], remembered=[1.0, 2.0]).tolist() == [1.0, 2.0]


@given(
    st.lists(st.lists(st.tuples(st.floats(0, 10), st.booleans()), max_size=4), min_size=1),
    st.data(),
)
def test_the_estimate_is_finite_and_at_least_zero(sites, data):
    remembered = data.draw(st.lists(st.floats(0, 10), min_size=len(sites), max_size=len(sites)))
    promised = estimate(
        [[score for score, _ in site] for site in sites],
        [mature for site in sites for _, mature in site],
        remembered,
    )
    for site, before, now in zip(sites, remembered, promised, strict=True):
        if not site:
            assert now == before
        elif all(mature for _, mature in site):
            assert now == pytest.approx(min(score for score, _ in site), rel=0)
        else:
            assert now == 0


def test_a_site_promises_no_more_than_its_gradient_pays_for():
    demand, energy = np.array([4.0, 6.0, 1.0, 2.0]), np.array([2.0, 1.0, 0.5, 0.0])
    promised = price_by_gradient(demand, np.array([1, 2, 3, 1]), energy)
    assert promised.tolist() == [4, 2, 1, 2]  # the median price is 2; the last was not measured


def test_a_dead_site_of_which_nothing_is_known_promises_what_its_gradient_pays_for():
    demand, energy = np.array([3.0, 0.0, 0.0, 5.0]), np.array([1.0, 4.0, 4.0, 0.0])
    promised = price_by_gradient(demand, np.array([1, 0, 2, 0]), energy)
    assert promised.tolist() == [3, 12, 0, 5]  # the third is alive and young, the fourth remembered


@pytest.mark.parametrize(("demand", "energy"), [([2.0, 0.0], [0.0, 0.0]), ([0.0, 0.0], [1.0, 3.0])])
def test_without_a_price_promises_stay_what_they_are(demand, energy):
    promised = price_by_gradient(np.array(demand), np.array([1, 0]), np.array(energy))
    assert promised.tolist() == demand
