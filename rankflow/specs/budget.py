"""The budget spec: how many adapter parameters a model may train, when, and who gets them.

One flat table, so that a keyword of `load_budget`, a line of a TOML file and a ``--set`` of the
command line are the same word. Presets live in ``budgets/``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from rankflow.errors import SpecError
from rankflow.specs.reading import (
    ABSENT,
    Fault,
    Seed,
    Spec,
    check,
    check_keys,
    dotted,
    raise_faults,
    read_toml,
    suggest,
)

Schedule = Literal["constant", "linear", "cubic", "cubic-late", "step"]
Score = Literal[
    "frobenius", "norm", "sensitivity", "tangential", "taylor", "fisher", "random", "uniform"
]
Policy = Literal[
    "threshold", "knapsack", "knapsack-exact", "proportional", "uniform", "random", "frozen"
]
MagnitudeMode = Literal["always", "never", "budgeted"]
Renormalise = Literal["keep-scale", "none"]
Growth = Literal["gradient", "orthogonal", "random"]
Components = Literal["factors", "gated", "vera"]
TargetKey = Literal["rank", "params", "fraction", "bytes"]

TARGETS: Final[tuple[TargetKey, ...]] = ("rank", "params", "fraction", "bytes")
"""The keys of which a budget has exactly one."""


def _fraction_or_whole(value: float) -> float:
    if value >= 1 and value != int(value):
        raise ValueError(
            "must be a fraction of the total steps (below 1) or a whole number of steps"
        )
    return value


def _valid_pattern(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"must be the end of a module path or a regex; {error}") from None
    return pattern


# No model comes near these; what lies above does not fit the numbers that it is reckoned with.
Factor = Annotated[float, Field(gt=0, lt=1e9)]
Size = Annotated[int, Field(gt=0, lt=2**60)]
Duration = Annotated[float, Field(lt=1e15), AfterValidator(_fraction_or_whole)]
Pattern = Annotated[str, AfterValidator(_valid_pattern)]


class RankBounds(Spec):
    """Smallest and largest rank of the sites that match a pattern.

    Attributes:
        min_rank: Smallest rank; None for the one that the budget gives to every site.
        max_rank: Largest rank; None for the one that the budget gives to every site.
    """

    min_rank: NonNegativeInt | None = None
    max_rank: NonNegativeInt | None = None


class BudgetSpec(Spec):
    """A parameter budget and the way to spend it.

    Patterns follow PEFT's ``rank_pattern``: the end of a module path, or a regex for it; the first
    match counts. The defaults reallocate a constant budget.

    Attributes:
        rank: Target: as many parameters as plain LoRA of this rank trains on the same sites.
        params: Target: trainable adapter parameters.
        fraction: Target: share of the base model's parameters.
        bytes: Target: bytes of the trainable adapter parameters.
        start: Budget at the first step, as a factor of the target.
        schedule: Way from the start budget to the target.
        stages: Number of equal steps down of the ``step`` schedule.
        warmup: Steps at the start budget: a fraction of all below 1, else a number of steps.
        cooldown: Steps without reallocation at the end, in the same unit.
        every: Steps from one reallocation to the next, in the same unit.
        components: What a component is made of: ``factors`` are a row of A and a column of B, as in
            LoRA; ``gated`` adds a scalar c that starts at 0, as in Dynamic-Rank DoRA; of ``vera``
            the row and the column are random, shared and frozen, and the scalar is all it costs.
        dem: Weight of Dynamic-Rank DoRA's DEM regulariser until the cool-down, 0 for none.
        score: Estimate of a component's worth.
        decay: Decay per step of the score's moving average, 0 for the last step alone.
        policy: Rule that turns scores and a budget into ranks.
        recycle: Largest share of the budget that one event may move from pruned to newborn
            components; it decays to 0 at the cool-down.
        hysteresis: A newborn must promise 1 + this times the score of what it displaces.
        protect: Events through which a newborn cannot be pruned.
        magnitude: What becomes of DoRA's magnitudes: a site trains its own at every rank, never, or
            as long as it earns its parameters.
        renormalise: What a magnitude does when its site loses components, which moves the norms of
            all rows: keep its value, or the scale of what stays (``m`` times new norm by old). The
            function changes by 0.1% to 0.9% less if it keeps its value
            (``examples/benchmarks/renormalise.py``).
        grow: Where newborns point: along the gradient where it is largest outside of what their
            site spans, at random orthogonal to it, or at random as PEFT initialises.
        grow_steps: Steps before an event over which that gradient is averaged.
        min_rank: Smallest rank of every site.
        max_rank: Largest rank of every site; None for the smaller side of its matrix. VeRA's random
            matrices have as many rows as the largest, so set it there.
        bounds: Other bounds for some sites, by pattern.
        ranks: The ranks of the ``frozen`` policy, by pattern. A budgeted magnitude is on, unless a
            pattern such as ``q_proj.magnitude`` gives it 0.
        seed: Seed of the ``random`` score and policy and of newborn directions.
        description: One line for people.
    """

    rank: Factor | None = None
    params: Size | None = None
    fraction: Annotated[float, Field(gt=0, lt=1)] | None = None
    bytes: Size | None = None

    start: Factor = 1.0
    schedule: Schedule = "constant"
    stages: PositiveInt = 4
    warmup: Annotated[Duration, Field(ge=0)] = 0.1
    cooldown: Annotated[Duration, Field(ge=0)] = 0.3
    every: Annotated[Duration, Field(gt=0)] = 0.02

    components: Components = "factors"
    dem: Annotated[float, Field(ge=0)] = 0.0

    score: Score = "taylor"
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9

    policy: Policy = "knapsack"
    recycle: Annotated[float, Field(ge=0, le=1)] = 0.2
    hysteresis: Annotated[float, Field(ge=0)] = 1.0
    protect: NonNegativeInt = 1
    magnitude: MagnitudeMode = "always"
    renormalise: Renormalise = "none"
    grow: Growth = "gradient"
    grow_steps: PositiveInt = 4
    min_rank: NonNegativeInt = 0
    max_rank: NonNegativeInt | None = None
    bounds: dict[Pattern, RankBounds] = Field(default_factory=dict)
    ranks: dict[Pattern, NonNegativeInt] = Field(default_factory=dict)

    seed: Seed = 0
    description: str = ""

    @property
    def target(self) -> tuple[TargetKey, float]:
        """The key of the target that was set, and its value."""
        return next((key, value) for key, value in _targets(self).items() if value is not None)

    def bounds_of(self, site: str) -> tuple[int, int | None]:
        """Smallest and largest rank of a site; the largest is None where only the matrix limits it.

        >>> spec = BudgetSpec(rank=4, min_rank=1, bounds={"q_proj": RankBounds(max_rank=2)})
        >>> spec.bounds_of("layers.0.q_proj"), spec.bounds_of("layers.0.v_proj")
        ((1, 2), (1, None))
        """
        pattern = match_pattern(self.bounds, site)
        return self._merge(self.bounds[pattern] if pattern is not None else RankBounds())

    def frozen_rank_of(self, site: str) -> int | None:
        """Rank that ``ranks`` gives to a site; None where no pattern matches it."""
        pattern = match_pattern(self.ranks, site)
        return self.ranks[pattern] if pattern is not None else None

    def contradictions(self) -> Iterator[Fault]:
        """Faults between keys that are sound by themselves."""
        yield from self._target_faults()
        yield from self._schedule_faults()
        yield from self._rank_faults()
        yield from self._component_faults()
        if self.magnitude == "budgeted" and self.score == "frobenius":
            yield Fault(
                {"magnitude": self.magnitude, "score": self.score},
                "this score is a component's share of its site, and says nothing of a magnitude; "
                "set score = 'taylor', or another magnitude",
            )

    def _target_faults(self) -> Iterator[Fault]:
        given: dict[str, float] = {k: v for k, v in _targets(self).items() if v is not None}
        if len(given) > 1:
            yield Fault(given, "a budget has one target; keep one of these")
        if not given:
            yield Fault(dict.fromkeys(TARGETS, ABSENT), "no target; set one of these")

    def _schedule_faults(self) -> Iterator[Fault]:
        if self.schedule == "constant" and self.start != 1:
            yield Fault(
                {"schedule": self.schedule, "start": self.start},
                "a constant budget starts at its target; set start = 1, or another schedule",
            )
        if "stages" in self.model_fields_set and self.schedule != "step":
            yield Fault(
                {"stages": self.stages, "schedule": self.schedule},
                "only the step schedule has stages; remove them, or set schedule = 'step'",
            )
        if self.warmup < 1 and self.cooldown < 1 and self.warmup + self.cooldown >= 1:
            yield Fault(
                {"warmup": self.warmup, "cooldown": self.cooldown},
                "leave no step to reallocate in; their sum must be below 1",
            )

    def _component_faults(self) -> Iterator[Fault]:
        if self.components == "vera" and self.dem > 0:
            yield Fault(
                {"components": self.components, "dem": self.dem},
                "the regulariser acts on trained rows and columns, and VeRA's are frozen; "
                "set dem = 0",
            )

    def _rank_faults(self) -> Iterator[Fault]:
        if self.max_rank is not None and self.min_rank > self.max_rank:
            yield Fault(
                {"min_rank": self.min_rank, "max_rank": self.max_rank},
                "min_rank must not exceed max_rank",
            )
        for pattern, bounds in self.bounds.items():
            if bounds == RankBounds():
                yield Fault(
                    {dotted("bounds", pattern): {}}, "bounds nothing; set min_rank or max_rank"
                )
            low, high = self._merge(bounds)
            if high is not None and low > high:
                yield Fault(
                    {
                        dotted("bounds", pattern, "min_rank"): low,
                        dotted("bounds", pattern, "max_rank"): high,
                    },
                    "min_rank must not exceed max_rank, the budget's own bounds included",
                )
        if self.policy == "frozen" and not self.ranks:
            yield Fault(
                {"policy": self.policy, "ranks": ABSENT},
                "the frozen policy needs ranks, such as ranks = { q_proj = 4, v_proj = 8 }",
            )
        if self.ranks and self.policy != "frozen":
            yield Fault(
                {"ranks": self.ranks, "policy": self.policy},
                "only the frozen policy takes ranks; remove them, or set policy = 'frozen'",
            )

    def _merge(self, bounds: RankBounds) -> tuple[int, int | None]:
        low = self.min_rank if bounds.min_rank is None else bounds.min_rank
        high = self.max_rank if bounds.max_rank is None else bounds.max_rank
        return low, high


def resolve_steps(value: float, total_steps: int) -> int:
    """Turn a duration of a budget spec into optimizer steps.

    ``value >= 1`` is a number of steps already; ``0 < value < 1`` is a fraction of the total, at
    least one step.

    Args:
        value: A duration such as ``warmup``.
        total_steps: Optimizer steps of the whole run.

    >>> resolve_steps(0.15, 1000), resolve_steps(100, 1000), resolve_steps(0.001, 10)
    (150, 100, 1)
    """
    if value >= 1 or value == 0:
        return int(value)
    return max(1, round(value * total_steps))


def match_pattern(patterns: Iterable[str], site: str) -> str | None:
    """The first pattern that matches a site's name, by PEFT's rule for ``rank_pattern``.

    >>> match_pattern(["proj", "q_proj", "layers.*"], "model.layers.0.q_proj")
    'q_proj'
    """
    return next((pattern for pattern in patterns if _compile(pattern).match(site)), None)


def load_budget(preset_or_path: str | Path, **overrides: Any) -> BudgetSpec:
    """Load a budget spec.

    Args:
        preset_or_path: Name of a preset (see `list_budgets`), or path of a TOML file.
        **overrides: Keys of `BudgetSpec`; a target replaces the file's target.

    Raises:
        SpecError: Anything is wrong with it; all faults are listed.
    """
    spec, faults = read_budget(preset_or_path, overrides)
    source = f"budget {str(preset_or_path)!r}"
    raise_faults(f"{source} with overrides" if overrides else source, faults)
    assert spec is not None
    return spec


def read_budget(
    preset_or_path: str | Path, overrides: Mapping[str, Any]
) -> tuple[BudgetSpec | None, list[Fault]]:
    """Like `load_budget`, but hand back the faults; one of the file itself is under ``preset``."""
    try:
        values = read_toml(find_budget(preset_or_path))
    except SpecError as error:
        fault = Fault({"preset": str(preset_or_path)}, str(error))
        return None, [fault, *check_keys(BudgetSpec, overrides)]
    if any(key in overrides for key in TARGETS):
        values = {key: value for key, value in values.items() if key not in TARGETS}
    return check(BudgetSpec, values | dict(overrides))


def find_budget(preset_or_path: str | Path) -> Path:
    """The file of a preset, or the path as it is.

    Raises:
        SpecError: It is neither a path nor a preset's name.
    """
    if not isinstance(preset_or_path, str | Path):
        raise SpecError(
            "a budget is a preset's name or a path, and this is of type "
            f"{type(preset_or_path).__name__}; keys go by name, as in load_budget('hybrid', rank=8)"
        )
    if isinstance(preset_or_path, Path) or is_path(preset_or_path):
        return Path(preset_or_path)
    presets = list_budgets()
    if preset_or_path not in presets:
        raise SpecError(
            f"no such preset; {suggest(preset_or_path, presets)} "
            f"The presets are {', '.join(presets)}; a path ends in .toml"
        )
    return presets[preset_or_path]


def list_budgets() -> dict[str, Path]:
    """The presets: their names, sorted, and their files."""
    return {path.stem: path for path in sorted(_preset_folder().glob("*.toml"))}


def is_path(preset_or_path: str) -> bool:
    """Whether a text is the path of a budget file, and not the name of a preset.

    >>> is_path("adalora"), is_path("mine.toml"), is_path("specs/mine")
    (False, True, True)
    """
    return preset_or_path.endswith(".toml") or "/" in preset_or_path or "\\" in preset_or_path


def _preset_folder() -> Path:
    package = Path(__file__).parents[1]
    installed = package / "budgets"
    return installed if installed.is_dir() else package.parent / "budgets"


def _compile(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(.*\.)?({pattern})$")


def _targets(spec: BudgetSpec) -> dict[TargetKey, float | None]:
    return {
        "rank": spec.rank,
        "params": spec.params,
        "fraction": spec.fraction,
        "bytes": spec.bytes,
    }
