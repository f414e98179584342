from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key
from pydantic import ValidationError

from rankflow.errors import SpecError
from rankflow.specs.budget import (
    TARGETS,
    BudgetSpec,
    RankBounds,
    find_budget,
    list_budgets,
    load_budget,
    match_pattern,
    resolve_steps,
)

ROOT = Path(__file__).parents[2]
PRESETS = ["adalora", "dynamic-rank-dora", "fixed", "hybrid", "prune", "reallocate"]


@pytest.fixture
def write(tmp_path):
    def write_budget(text):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write_budget


def faults_of(preset_or_path, **overrides):
    """The message of the refusal, its lines stripped."""
    with pytest.raises(SpecError) as caught:
        load_budget(preset_or_path, **overrides)
    return [line.strip() for line in str(caught.value).splitlines()]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_loads_with_rank_8_as_target(name):
    spec = load_budget(name)
    assert spec.target == ("rank", 8)
    assert spec.description


def test_the_presets_are_the_files_in_the_budgets_folder():
    assert list(list_budgets()) == PRESETS
    assert sorted(path.stem for path in (ROOT / "budgets").iterdir()) == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_says_what_it_is_for_where_it_comes_from_and_how_to_use_it(name):
    lines = list_budgets()[name].read_text(encoding="utf-8").splitlines()
    header = [line for line in lines if line.startswith("#")]
    assert header[0].startswith(f"# {name}: ")
    for part in ("# For: ", "# Source: ", "# Use: rankflow "):
        assert any(line.startswith(part) for line in header)


def test_dynamic_rank_dora_has_the_settings_of_its_paper():
    spec = load_budget("dynamic-rank-dora")
    assert (spec.start, spec.score, spec.decay, spec.policy) == (1.5, "frobenius", 0.9, "threshold")
    assert spec.schedule == "cubic-late"
    assert spec.components == "gated"
    assert 0.1 <= spec.dem <= 0.5
    assert [resolve_steps(d, 1000) for d in (spec.warmup, spec.cooldown, spec.every)] == [
        150,
        500,
        100,
    ]


def test_the_control_cannot_reallocate():
    spec = load_budget("fixed")
    assert (spec.policy, spec.score, spec.recycle, spec.start) == ("uniform", "uniform", 0, 1)


def test_reallocate_moves_a_share_of_a_constant_budget():
    spec = load_budget("reallocate")
    assert (spec.start, spec.schedule) == (1, "constant")
    assert spec.recycle > 0


def test_a_path_loads_like_a_preset(write):
    path = write("params = 1_250_000\nstart = 2\nschedule = 'step'\nstages = 3\n")
    for given_path in (path, str(path)):
        spec = load_budget(given_path)
        assert spec.target == ("params", 1_250_000)
        assert (spec.start, spec.schedule, spec.stages) == (2.0, "step", 3)


@pytest.mark.parametrize(
    ("key", "value"), [("rank", 2.5), ("params", 1000), ("fraction", 0.005), ("bytes", 4096)]
)
def test_overriding_one_target_replaces_the_target_of_the_preset(key, value):
    spec = load_budget("adalora", **{key: value})
    assert spec.target == (key, value)
    assert [getattr(spec, other) for other in TARGETS if other != key] == [None] * 3
    assert spec.score == "sensitivity"


def test_overrides_other_than_the_target_leave_the_target():
    spec = load_budget("adalora", score="fisher", every=0.5, max_rank=None)
    assert (spec.target, spec.score, spec.every) == (("rank", 8), "fisher", 0.5)


def test_a_spec_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        load_budget("fixed").rank = 3


SOUND = {
    "rank": 4.5,
    "params": 12,
    "fraction": 0.5,
    "bytes": 12,
    "start": 1,
    "schedule": "constant",
    "stages": 2,
    "warmup": 10,
    "cooldown": 0.25,
    "every": 1,
    "components": "gated",
    "dem": 0.5,
    "score": "random",
    "decay": 0,
    "policy": "proportional",
    "recycle": 1,
    "hysteresis": 0.5,
    "protect": 1,
    "magnitude": "budgeted",
    "renormalise": "keep-scale",
    "grow": "random",
    "grow_steps": 2,
    "min_rank": 1,
    "max_rank": 64,
    "bounds": {"q_proj": {"min_rank": 2}},
    "ranks": {"q_proj": 2},
    "seed": 3,
    "description": "mine",
}
WRONG = {
    "rank": (0, "must be greater than 0"),
    "params": (1.5, "must be a valid integer"),
    "fraction": (1, "must be less than 1"),
    "bytes": ("4 kB", "must be a valid integer"),
    "start": (-1, "must be greater than 0"),
    "schedule": ("cubc", "did you mean 'cubic'?"),
    "stages": (0, "must be greater than 0"),
    "warmup": (1.5, "must be a fraction of the total steps (below 1) or a whole number of steps"),
    "cooldown": (-0.1, "must be greater than or equal to 0"),
    "every": (0, "must be greater than 0"),
    "components": ("gate", "did you mean 'gated'?"),
    "dem": (-0.1, "must be greater than or equal to 0"),
    "score": ("tailor", "did you mean 'taylor'?"),
    "decay": (1, "must be less than 1"),
    "policy": ("knapsak-exact", "did you mean 'knapsack-exact'?"),
    "recycle": (1.1, "must be less than or equal to 1"),
    "hysteresis": (float("nan"), "must be a finite number"),
    "protect": (True, "must be a valid integer"),
    "magnitude": ("budgetted", "did you mean 'budgeted'?"),
    "renormalise": ("keepscale", "did you mean 'keep-scale'?"),
    "grow": ("orthogonl", "did you mean 'orthogonal'?"),
    "grow_steps": (0, "must be greater than 0"),
    "min_rank": (-1, "must be greater than or equal to 0"),
    "max_rank": ("8", "must be a valid integer"),
    "bounds": (8, "must be a table"),
    "ranks": ([8], "must be a table"),
    "seed": (-1, "must be greater than or equal to 0"),
    "description": (8, "must be a valid string"),
}
ALONE = {"stages": {"schedule": "step"}, "ranks": {"policy": "frozen"}}


def test_the_tables_above_cover_every_key():
    assert set(SOUND) == set(WRONG) == set(BudgetSpec.model_fields)


@pytest.mark.parametrize("key", SOUND)
def test_every_key_is_an_override(key):
    spec = load_budget("reallocate", **{key: SOUND[key]}, **ALONE.get(key, {}))
    assert spec.model_dump(exclude_unset=True)[key] == SOUND[key]


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_value_is_named_with_what_was_received_and_what_must_hold(key):
    value, remedy = WRONG[key]
    head, received, said = faults_of("reallocate", **{key: value})
    assert head == "budget 'reallocate' with overrides: 1 fault"
    assert received.startswith(f"{key} = ")
    assert remedy in said


@given(key=st.sampled_from(list(BudgetSpec.model_fields)), at=st.integers(0, 30))
def test_a_key_with_a_letter_too_many_is_refused_and_its_right_form_named(key, at):
    typo = key[: at % len(key)] + "x" + key[at % len(key) :]
    assert f"unknown key; did you mean '{key}'?" in faults_of("fixed", **{typo: 1})


def test_all_faults_are_reported_at_once_contradictions_too():
    message = faults_of("fixed", rnk=3, rank=3, params=3, start=2.0, score="tailor")
    assert message[0] == "budget 'fixed' with overrides: 4 faults"
    assert {"rnk = 3", 'score = "tailor"', "rank = 3.0, params = 3"} < set(message)
    assert 'schedule = "constant", start = 2.0' in message


def test_a_contradiction_that_may_come_from_a_wrong_value_is_left_out(write):
    assert faults_of(write("rank = 'eight'"))[1:] == ['rank = "eight"', "must be a valid number"]


CONTRADICTIONS = {
    "no target": ("", "rank, params, fraction, bytes", "no target; set one of these"),
    "two targets": (
        "rank = 4\nbytes = 9",
        "rank = 4.0, bytes = 9",
        "a budget has one target; keep one of these",
    ),
    "constant with start": (
        "rank = 4\nstart = 1.5",
        'schedule = "constant", start = 1.5',
        "a constant budget starts at its target; set start = 1, or another schedule",
    ),
    "stages without steps": (
        "rank = 4\nstages = 3",
        'stages = 3, schedule = "constant"',
        "only the step schedule has stages; remove them, or set schedule = 'step'",
    ),
    "a regulariser of what is frozen": (
        'rank = 4\ncomponents = "vera"\ndem = 0.1',
        'components = "vera", dem = 0.1',
        "the regulariser acts on trained rows and columns, and VeRA's are frozen; set dem = 0",
    ),
    "no step left": (
        "rank = 4\nwarmup = 0.5\ncooldown = 0.5",
        "warmup = 0.5, cooldown = 0.5",
        "leave no step to reallocate in; their sum must be below 1",
    ),
    "bounds": (
        "rank = 4\nmin_rank = 4\nmax_rank = 3",
        "min_rank = 4, max_rank = 3",
        "min_rank must not exceed max_rank",
    ),
    "bounds by pattern": (
        "rank = 4\nmin_rank = 4\n[bounds.'layers.0']\nmax_rank = 3",
        'bounds."layers.0".min_rank = 4, bounds."layers.0".max_rank = 3',
        "min_rank must not exceed max_rank, the budget's own bounds included",
    ),
    "frozen without ranks": (
        "rank = 4\npolicy = 'frozen'",
        'policy = "frozen", ranks',
        "the frozen policy needs ranks, such as ranks = { q_proj = 4, v_proj = 8 }",
    ),
    "ranks without frozen": (
        "rank = 4\nranks = { q_proj = 4 }",
        'ranks = {"q_proj": 4}, policy = "knapsack"',
        "only the frozen policy takes ranks; remove them, or set policy = 'frozen'",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_contradiction_names_both_sides_and_the_remedy(case, write):
    text, received, remedy = CONTRADICTIONS[case]
    path = write(text)
    assert faults_of(path) == [f"budget '{path}': 1 fault", received, remedy]


def test_warmup_in_steps_does_not_contradict_a_cooldown_fraction():
    assert load_budget("fixed", warmup=500, cooldown=0.9).warmup == 500


def test_an_unknown_preset_is_refused_with_the_closest_one_and_all_others():
    message = faults_of("adalra", score="tailor")
    assert message[0] == "budget 'adalra' with overrides: 2 faults"
    assert message[2] == (
        f"no such preset; did you mean 'adalora'? The presets are {', '.join(PRESETS)}; "
        "a path ends in .toml"
    )
    assert message[3] == 'score = "tailor"'


@pytest.mark.parametrize(
    ("text", "trouble"),
    [
        (b"rank = 8\nscore = taylor\n", "is not valid TOML: Invalid value (at line 2, column 9)"),
        (b"rank 8\n", "is not valid TOML: Expected '=' after a key in a key/value pair"),
        (b"# caf\xe9\n", "is not UTF-8: invalid continuation byte at byte 5"),
    ],
)
def test_a_file_that_is_not_toml_is_named_with_the_place(tmp_path, text, trouble):
    path = tmp_path / "mine.toml"
    path.write_bytes(text)
    _, received, said = faults_of(path)
    assert received == f'preset = "{path}"'
    assert said.startswith(f"{path} {trouble}")


def test_a_missing_file_is_named(tmp_path):
    assert faults_of(tmp_path / "none.toml")[2].endswith(
        "none.toml cannot be read: No such file or directory; name a TOML file that exists"
    )


@pytest.mark.parametrize("text", ["mine.toml", "specs/mine", "specs\\mine"])
def test_what_looks_like_a_path_is_one(text):
    assert find_budget(text) == Path(text)


def test_a_path_object_is_never_a_preset():
    assert find_budget(Path("fixed")) == Path("fixed")
    assert find_budget("fixed") == list_budgets()["fixed"]


@pytest.mark.parametrize("key", ["bounds", "ranks"])
def test_a_pattern_that_is_no_regex_is_refused(key, write):
    table = "{ min_rank = 1 }" if key == "bounds" else "1"
    policy = "knapsack" if key == "bounds" else "frozen"
    path = write(f"rank = 4\npolicy = '{policy}'\n{key} = {{ 'q_proj[' = {table} }}")
    assert faults_of(path)[1:] == [
        f'{key}."q_proj[" = "q_proj["',
        "must be the end of a module path or a regex; unterminated character set at position 6",
    ]


def test_an_unknown_key_of_a_bound_names_the_closest_one():
    assert faults_of("fixed", bounds={"q_proj": {"min_rnk": 1}})[1:] == [
        "bounds.q_proj.min_rnk = 1",
        "unknown key; did you mean 'min_rank'?",
    ]


def test_bounds_of_a_site_fill_up_from_the_budgets_own():
    spec = BudgetSpec(
        rank=4,
        min_rank=1,
        max_rank=16,
        bounds={"q_proj": RankBounds(max_rank=4), r"layers\.[01]\..*": RankBounds(min_rank=2)},
    )
    assert spec.bounds_of("layers.0.q_proj") == (1, 4)
    assert spec.bounds_of("layers.0.v_proj") == (2, 16)
    assert spec.bounds_of("layers.2.v_proj") == (1, 16)


def test_frozen_ranks_are_found_by_pattern():
    spec = BudgetSpec(rank=4, policy="frozen", ranks={"q_proj": 0, ".*proj": 3})
    sites = ["layers.0.q_proj", "layers.0.v_proj", "head"]
    assert [spec.frozen_rank_of(site) for site in sites] == [0, 3, None]


SEGMENT = st.sampled_from(["layers", "0", "1", "10", "q_proj", "k_proj", "my_q_proj"])
PATTERN = st.sampled_from(
    ["q_proj", "0.q_proj", r"layers\.1.*", "layers", "1", "k_proj|q_proj", r".*\.(0|1)\..*", "^q"]
)


@given(patterns=st.lists(PATTERN, unique=True), segments=st.lists(SEGMENT, min_size=1, max_size=4))
def test_patterns_match_as_pefts_rank_pattern_does(patterns, segments):
    site = ".".join(segments)
    expected = get_pattern_key(patterns, site)
    found = match_pattern(patterns, site)
    assert found == expected if found is not None else expected == site


@given(value=st.floats(0, 1, exclude_min=True, exclude_max=True), total=st.integers(1, 10**6))
def test_a_fraction_resolves_to_the_nearest_number_of_steps_but_at_least_one(value, total):
    steps = resolve_steps(value, total)
    assert 1 <= steps <= total
    assert steps == 1 or abs(steps - value * total) <= 0.5


@given(value=st.integers(1, 10**6), total=st.integers(1, 10**6))
def test_a_number_of_steps_resolves_to_itself(value, total):
    assert resolve_steps(float(value), total) == value


def test_nothing_resolves_to_nothing():
    assert resolve_steps(0.0, 1000) == 0


def test_the_target_schedules_scores_and_policies_of_a_spec_are_those_of_the_engine():
    from rankflow.allocation.policies import POLICIES
    from rankflow.allocation.schedules import SCHEDULES

    for key, names in (("schedule", SCHEDULES), ("policy", POLICIES)):
        assert list(BudgetSpec.model_fields[key].annotation.__args__) == list(names)
