import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankflow.specs.overrides import apply_overrides

KEY = st.text("abcxyz_", min_size=1, max_size=5)
VALUE = st.recursive(
    st.booleans() | st.integers(-(10**9), 10**9) | st.text("ab c'=.#[", max_size=8),
    lambda values: st.lists(values, max_size=3),
)


@given(path=st.lists(KEY, min_size=1, max_size=3), value=VALUE)
def test_a_value_written_as_toml_arrives_at_its_dotted_key(path, value):
    document, faults = apply_overrides({}, [f"{'.'.join(path)}={json.dumps(value)}"], {})
    for part in path:
        document = document[part]
    assert (document, faults) == (value, [])


@given(text=st.text("abc/-_:+ .", max_size=12).filter(lambda t: t.strip() not in ("", "-", "+")))
def test_what_is_not_toml_is_a_string(text):
    assert apply_overrides({}, [f"name={text}"], {}) == ({"name": text.strip()}, [])


@pytest.mark.parametrize(
    ("override", "value"),
    [("x=2", 2), ("x=1e-3", 0.001), ("x=true", True), ("x = 'a b'", "a b"), ("x=", "")],
)
def test_values_have_toml_types(override, value):
    assert apply_overrides({}, [override], {}) == ({"x": value}, [])


def test_neighbours_stay_and_the_document_is_not_changed():
    document = {"budget": {"rank": 8, "score": "taylor"}, "seed": 1}
    changed, _ = apply_overrides(document, ["budget.rank=2", "budget.rank=3"], {})
    assert changed == {"budget": {"rank": 3, "score": "taylor"}, "seed": 1}
    assert document == {"budget": {"rank": 8, "score": "taylor"}, "seed": 1}


def test_a_whole_table_is_replaced():
    document = {"budget": {"ranks": {"q": 1, "v": 2}}}
    changed, _ = apply_overrides(document, ["budget.ranks={k = 3}"], {})
    assert changed == {"budget": {"ranks": {"k": 3}}}


def test_a_quoted_part_of_a_key_may_hold_dots():
    changed, _ = apply_overrides({}, ['bounds."layers.0".max_rank=3'], {})
    assert changed == {"bounds": {"layers.0": {"max_rank": 3}}}


def test_an_alternative_replaces_the_others_in_its_own_table_only():
    document = {"budget": {"params": 9, "start": 1}, "data": {"params": 9}}
    changed, _ = apply_overrides(document, ["budget.rank=2"], {"budget": ["rank", "params"]})
    assert changed == {"budget": {"rank": 2, "start": 1}, "data": {"params": 9}}


@pytest.mark.parametrize("override", ["rank", "=3", "a b=3", "a..b=3", "budget.=2", ""])
def test_an_override_without_a_key_or_value_is_a_fault(override):
    document, (fault,) = apply_overrides({"seed": 1}, [override], {})
    assert document == {"seed": 1}
    assert fault.received == {"override": override}
    assert fault.remedy == "must read as in budget.rank=2"
