"""The plain values of an engine's state: what each must be, how many, and of which run."""

from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    StrictBool,
    StrictInt,
    ValidationError,
)

from rankflow.errors import CheckpointError, excerpt
from rankflow.records import RankEvent

Count = Annotated[StrictInt, Field(ge=0, lt=2**63)]


class _Values(BaseModel):
    """The state without its tensors; keys that are new since are let through."""

    model_config = ConfigDict(extra="allow")

    budget: dict[str, Any]
    total_steps: Count
    ranks: dict[str, Count]
    steps: Count
    observed: Count
    limit: Count
    magnitudes: list[StrictBool]
    young: list[list[Count]]
    ages: list[Count]
    demand: list[FiniteFloat]
    magnitude_ages: list[Count]
    promise: list[FiniteFloat]
    history: list[RankEvent]
    slots: list[list[Count]] | None = None  # of a run under FSDP2


def check_state(state: dict[str, Any]) -> None:
    """Check the values of ``RankFlow.state_dict()``: their types, and that they fit each other.

    Args:
        state: The state without its tensors.

    Raises:
        ValueError: A value is missing, of another type, not finite, or there are too many or too
            few of it for the ranks.
    """
    try:
        values = _Values.model_validate(state)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
        place = ".".join(map(str, fault["loc"]))
        raise ValueError(f"{place} is {excerpt(fault['input'])}: {fault['msg']}") from error
    sites, components = len(values.ranks), sum(values.ranks.values())
    counts = {
        "magnitudes": (len(values.magnitudes), sites),
        "young": (len(values.young), sites),
        "ages": (len(values.ages), components),
        "demand": (len(values.demand), sites),
        "magnitude_ages": (len(values.magnitude_ages), sites),
        "promise": (len(values.promise), sites),
    }
    for key, (found, expected) in counts.items():
        if found != expected:
            raise ValueError(f"{key} has {found} values and the ranks ask for {expected}")
    if [len(steps) for steps in values.young] != list(values.ranks.values()):
        raise ValueError("young does not count the components of each site")
    if not _fits(values.slots, list(values.ranks.values())):
        raise ValueError("slots does not give each component of each site a slot of its own")
    if values.steps > values.total_steps:
        raise ValueError(f"it is at step {values.steps} of {values.total_steps}")


def check_same_run(
    state: dict[str, Any], budget: dict[str, Any], total_steps: int, sites: list[str]
) -> None:
    """Check that a state belongs to a run.

    Args:
        state: What ``RankFlow.state_dict()`` returned.
        budget: The run's budget, as plain values.
        total_steps: Its optimizer steps.
        sites: Names of its sites, in order.

    Raises:
        CheckpointError: It was saved in another.
    """
    mine = {"budget": budget, "total_steps": total_steps, "sites": sites}
    theirs = {
        "budget": state["budget"],
        "total_steps": state["total_steps"],
        "sites": list(state["ranks"]),
    }
    for key, value in mine.items():
        if theirs[key] != value:
            raise CheckpointError(
                f"the saved state has other {key} than this run: {theirs[key]} instead of "
                f"{value}; resume with the spec and the model that wrote it"
            )


def _fits(slots: list[list[int]] | None, ranks: list[int]) -> bool:
    if slots is None:
        return True
    return [len(live) for live in slots] == ranks == [len(set(live)) for live in slots]
