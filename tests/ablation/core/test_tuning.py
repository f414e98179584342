import math

from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.ablation.tuning import (
    Grid,
    Point,
    best_point,
    mean_losses,
    next_points,
)

FIRST = st.sampled_from([1e-4, 3e-3, 0.004, 0.02])


def is_at_edge(found, point):
    """Whether no worse rate was measured on one side of a point."""
    rates = [p.rate for p in found if p.scaling == point.scaling]
    return point.rate in (min(rates), max(rates))


def tune(grid, loss):
    """Measure what is asked for until nothing is; return the losses found."""
    found = {}
    for _ in range(200):
        points = next_points(found, grid)
        if not points:
            return found
        assert len(set(points)) == len(points)
        assert not set(points) & set(found)
        found |= {point: loss(point) for point in points}
    raise AssertionError("tuning does not end")


def steps_of(grid):
    """All rates that a grid of two rates allows, in order."""
    first, rates = grid.rates[0], []
    for k in range(-12, 13):
        rate = first * 2.0**k
        if grid.allows(rate):
            rates.append(rate)
    return rates


@settings(deadline=None)
@given(first=FIRST, best=st.floats(-14, 14), steepness=st.floats(0.1, 9), widest=st.integers(0, 5))
def test_the_best_rate_of_any_convex_loss_is_found_and_bracketed(first, best, steepness, widest):
    grid = Grid((first, 2 * first), widest=2.0**widest)

    def loss(point):
        x = math.log2(point.rate / first) - best
        return steepness * x * x + abs(x)

    found = tune(grid, loss)
    chosen = best_point(found)
    rates = steps_of(grid)
    assert math.isclose(found[chosen], min(loss(Point(rate)) for rate in rates))
    is_bound = any(math.isclose(chosen.rate, rate) for rate in (rates[0], rates[-1]))
    assert not is_at_edge(found, chosen) or is_bound


@settings(deadline=None)
@given(first=FIRST, limit=st.floats(-10, 10), widest=st.integers(0, 5))
def test_tuning_leaves_rates_at_which_training_diverges(first, limit, widest):
    grid = Grid((first, 2 * first), widest=2.0**widest)

    def loss(point):
        x = math.log2(point.rate / first)
        return math.inf if x > limit else 20.0 - x  # the larger the better, until it diverges

    found = tune(grid, loss)
    sound = [rate for rate in steps_of(grid) if math.log2(rate / first) <= limit]
    if sound:
        assert math.isclose(best_point(found).rate, max(sound))
    else:
        assert not math.isfinite(min(found.values()))


@settings(deadline=None)
@given(
    rates=st.lists(st.floats(1e-5, 1.0), min_size=1, max_size=4, unique=True),
    widest=st.floats(1, 100),
    losses=st.randoms(use_true_random=False),
)
def test_tuning_of_any_loss_ends_within_the_widest_bounds(rates, widest, losses):
    grid = Grid(tuple(rates), (1.0, 2.0, 0.5), widest)
    found = tune(grid, lambda point: losses.choice([losses.random(), math.inf]))
    assert all(Point(rate) in found for rate in rates)
    for point in found:
        assert min(rates) / widest * 0.999 <= point.rate <= max(rates) * widest * 1.001


@settings(deadline=None)
@given(best=st.floats(-3, 3), gain=st.floats(-2, 2))
def test_a_scaling_is_tried_at_the_best_rate_and_a_better_one_is_bracketed(best, gain):
    grid = Grid((0.01, 0.02), (1.0, 4.0), widest=1024)

    def loss(point):
        shift = 1 if point.scaling == 4.0 else 0  # another scaling likes another rate
        x = math.log2(point.rate / 0.01) - best + shift
        return x * x - gain * shift

    found = tune(grid, loss)
    chosen = best_point(found)
    assert {point.scaling for point in found} == {1.0, 4.0}
    assert not is_at_edge(found, chosen)
    assert found[chosen] == min(found.values())


def test_the_first_scaling_is_the_one_to_start_with():
    assert next_points({}, Grid((0.1,), (2.0, 1.0))) == [Point(0.1, 2.0)]


def test_the_smallest_of_equally_good_rates_is_chosen():
    assert best_point({Point(0.2): 1.0, Point(0.1): 1.0, Point(0.4): 1.0}) == Point(0.1)


def test_a_point_with_a_failed_or_diverged_seed_is_infinite():
    losses = {Point(0.1): [1.0, 3.0], Point(0.2): [1.0, math.nan], Point(0.4): [math.inf]}
    assert mean_losses(losses) == {
        Point(0.1): 2.0,
        Point(0.2): math.inf,
        Point(0.4): math.inf,
    }


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_the_mean_does_not_depend_on_which_seed_ended_first(losses, random):
    shuffled = random.sample(losses, len(losses))
    assert mean_losses({Point(1.0): losses}) == mean_losses({Point(1.0): shuffled})
