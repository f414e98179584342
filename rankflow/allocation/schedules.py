"""Budget schedules: pure functions from the optimizer step to the budget, in parameters.

A schedule is a curve ``f``, the fraction of the way from the start budget ``b_0`` to the target
``b_T`` that is covered at progress ``p`` of the reallocation window:

    b(p) = floor(b_0 + (b_T - b_0) f(p)),   p = (step - warmup) / (total - cooldown - warmup)

Progress is an exact fraction, not a float: every process and every resumed run computes the same
integer, and rounding down never lets a budget exceed its real value.
"""

from collections.abc import Callable
from fractions import Fraction
from math import floor

from rankflow.errors import BudgetError, SpecError

Curve = Callable[[Fraction], Fraction]
BudgetSchedule = Callable[[int], int]

SCHEDULES = ("constant", "linear", "cubic", "cubic-late", "step")


def linear(p: Fraction) -> Fraction:
    """The same change at every step: ``f(p) = p``.

    >>> linear(Fraction(1, 4))
    Fraction(1, 4)
    """
    return p


def cubic(p: Fraction) -> Fraction:
    """Most of the change early: ``f(p) = 1 - (1 - p)^3``, AdaLoRA's (arXiv 2303.10512).

    >>> cubic(Fraction(1, 2))
    Fraction(7, 8)
    """
    return 1 - (1 - p) ** 3


def cubic_late(p: Fraction) -> Fraction:
    """Most of the change late: ``f(p) = p^3``, Dynamic-Rank DoRA's (arXiv 2405.17357).

    >>> cubic_late(Fraction(1, 2))
    Fraction(1, 8)
    """
    return p**3


def staircase(stages: int) -> Curve:
    """Equal jumps: ``f(p) = floor(p * stages) / stages``; the last one is at ``p = 1``.

    Args:
        stages: Number of jumps.

    >>> [str(staircase(2)(Fraction(i, 4))) for i in range(5)]
    ['0', '0', '1/2', '1/2', '1']
    """
    return lambda p: Fraction(floor(p * stages), stages)


def make_schedule(
    name: str,
    *,
    start: int,
    target: int,
    total_steps: int,
    warmup_steps: int = 0,
    cooldown_steps: int = 0,
    stages: int = 4,
) -> BudgetSchedule:
    """Build the function that maps an optimizer step to the budget.

    Up to the end of the warm-up the budget is ``start``; from the beginning of the cool-down it is
    exactly ``target``. The target may lie above the start: the model then grows.

    Args:
        name: ``constant`` (the target at every step, whatever the start), ``linear``, ``cubic``,
            ``cubic-late`` or ``step``.
        start: Budget during the warm-up, in parameters.
        target: Budget from the cool-down on, in parameters.
        total_steps: Length of the training, in steps.
        warmup_steps: Steps before the budget begins to move.
        cooldown_steps: Steps at the end during which the budget no longer moves.
        stages: Number of equal jumps of ``step``.

    Returns:
        A function of the step that returns the budget in parameters.

    Raises:
        BudgetError: If a budget is not positive, or the window is empty.
        SpecError: If no schedule has this name.

    >>> budget_at = make_schedule(
    ...     "cubic", start=1500, target=1000, total_steps=100, warmup_steps=10, cooldown_steps=50
    ... )
    >>> [budget_at(step) for step in (0, 10, 30, 50, 100)]
    [1500, 1500, 1062, 1000, 1000]
    """
    _check_budgets(start, target)
    _check_steps(total_steps, warmup_steps, cooldown_steps)
    if name == "constant":
        return lambda step: target
    curve = _find_curve(name, stages)
    window = total_steps - cooldown_steps - warmup_steps

    def budget_at(step: int) -> int:
        progress = Fraction(min(max(step - warmup_steps, 0), window), window)
        return floor(start + (target - start) * curve(progress))

    return budget_at


def _find_curve(name: str, stages: int) -> Curve:
    match name:
        case "linear":
            return linear
        case "cubic":
            return cubic
        case "cubic-late":
            return cubic_late
        case "step":
            if stages < 1:
                raise BudgetError(f"a step schedule needs at least 1 stage, got stages={stages}")
            return staircase(stages)
        case _:
            raise SpecError(f"no schedule is named {name!r}; choose one of {', '.join(SCHEDULES)}")


def _check_budgets(start: int, target: int) -> None:
    if start <= 0 or target <= 0:
        raise BudgetError(
            f"budgets must be positive, got start={start} and target={target} parameters"
        )


def _check_steps(total: int, warmup: int, cooldown: int) -> None:
    if warmup < 0 or cooldown < 0:
        raise BudgetError(
            f"steps cannot be negative, got warmup_steps={warmup} and cooldown_steps={cooldown}"
        )
    if warmup + cooldown >= total:
        raise BudgetError(
            f"no step is left to move the budget: warmup_steps={warmup} plus "
            f"cooldown_steps={cooldown} must be less than total_steps={total}; shorten one of them"
        )
