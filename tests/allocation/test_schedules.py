import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankflow.allocation.schedules import SCHEDULES, make_schedule
from rankflow.errors import BudgetError, SpecError

MOVING = [name for name in SCHEDULES if name != "constant"]

EQUATIONS = {
    "linear": lambda b0, bt, p: b0 - (b0 - bt) * p,
    "cubic": lambda b0, bt, p: bt + (b0 - bt) * (1 - p) ** 3,
    "cubic-late": lambda b0, bt, p: b0 - (b0 - bt) * p**3,
}


@st.composite
def schedule_arguments(draw):
    warmup, cooldown = draw(st.integers(0, 50)), draw(st.integers(0, 50))
    return {
        "start": draw(st.integers(1, 10**9)),
        "target": draw(st.integers(1, 10**9)),
        "total_steps": warmup + cooldown + draw(st.integers(1, 100)),
        "warmup_steps": warmup,
        "cooldown_steps": cooldown,
        "stages": draw(st.integers(1, 7)),
    }


@pytest.mark.parametrize("name", MOVING)
@settings(deadline=None)
@given(arguments=schedule_arguments())
def test_a_budget_moves_one_way_from_start_to_target_within_its_window(name, arguments):
    budget_at = make_schedule(name, **arguments)
    start, target, total = (arguments[key] for key in ("start", "target", "total_steps"))
    budgets = [budget_at(step) for step in range(total + 2)]
    assert set(budgets[: arguments["warmup_steps"] + 1]) == {start}
    assert set(budgets[total - arguments["cooldown_steps"] :]) == {target}
    assert budgets == sorted(budgets, reverse=start > target)


@pytest.mark.parametrize("name", EQUATIONS)
@settings(deadline=None)
@given(arguments=schedule_arguments(), share=st.floats(0, 1))
def test_a_budget_is_its_papers_equation_rounded_down(name, arguments, share):
    warmup = arguments["warmup_steps"]
    window = arguments["total_steps"] - warmup - arguments["cooldown_steps"]
    step = warmup + round(share * window)
    real = EQUATIONS[name](arguments["start"], arguments["target"], (step - warmup) / window)
    budget = make_schedule(name, **arguments)(step)
    assert isinstance(budget, int)
    assert real - 1 - 1e-5 < budget <= real + 1e-5


def test_rounding_down_is_exact_where_floats_would_fall_short():
    # In floats 1 - (1 - 0.1)**3 is 0.2709999999999999, and the budget would be 270.
    budget_at = make_schedule("cubic", start=1, target=1001, total_steps=10)
    assert math.floor(1 + 1000 * (1 - (1 - 0.1) ** 3)) == 271
    assert budget_at(1) == 272


def test_the_cubic_schedules_change_early_and_late():
    early, straight, late = (
        make_schedule(name, start=1500, target=1000, total_steps=100)(50)
        for name in ("cubic", "linear", "cubic-late")
    )
    assert (early, straight, late) == (1062, 1250, 1437)


def test_a_step_schedule_falls_by_equal_amounts_at_equal_distances():
    budget_at = make_schedule(
        "step", start=1400, target=1000, total_steps=100, warmup_steps=20, stages=4
    )
    assert [budget_at(step) for step in range(0, 101, 10)] == [
        *(1400, 1400, 1400, 1400, 1300, 1300, 1200, 1200, 1100, 1100, 1000)
    ]
    assert budget_at(39) == 1400
    assert budget_at(99) == 1100


def test_a_constant_schedule_is_at_the_target_even_during_the_warmup():
    budget_at = make_schedule("constant", start=9, target=5, total_steps=10, warmup_steps=4)
    assert {budget_at(step) for step in range(12)} == {5}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"start": 0}, "must be positive, got start=0 and target=5"),
        ({"target": -5}, "must be positive, got start=9 and target=-5"),
        ({"warmup_steps": -1}, "cannot be negative, got warmup_steps=-1"),
        ({"cooldown_steps": -2}, "cannot be negative, got warmup_steps=0 and cooldown_steps=-2"),
        (
            {"warmup_steps": 6, "cooldown_steps": 4},
            "warmup_steps=6 plus cooldown_steps=4 must be less than total_steps=10",
        ),
    ],
)
def test_a_schedule_that_cannot_be_followed_is_refused(name, changed, message):
    arguments = {"start": 9, "target": 5, "total_steps": 10} | changed
    with pytest.raises(BudgetError, match=message):
        make_schedule(name, **arguments)


def test_a_step_schedule_needs_a_stage():
    with pytest.raises(BudgetError, match="at least 1 stage, got stages=0"):
        make_schedule("step", start=9, target=5, total_steps=10, stages=0)


def test_an_unknown_schedule_is_refused_with_the_known_names():
    with pytest.raises(SpecError, match="'cubical'; choose one of constant, linear, cubic, "):
        make_schedule("cubical", start=9, target=5, total_steps=10)
