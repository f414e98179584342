import pytest

from rankflow.bench import cases
from rankflow.bench.cases import CASES, choose_cases
from rankflow.errors import RankFlowError


def test_names_of_cases_differ():
    assert len({case.name for case in CASES}) == len(CASES)


def test_all_cases_are_chosen_that_can_run(monkeypatch):
    monkeypatch.setattr(cases, "find_spec", lambda name: None)
    assert {case.shape for case in choose_cases()} == {"llama", "minilm"}
    monkeypatch.setattr(cases, "find_spec", lambda name: name)
    assert choose_cases() == CASES


def test_cases_are_chosen_by_name_and_type():
    names = ["llama-r32-bf16", "minilm-r8"]
    assert [case.name for case in choose_cases(names)] == names
    assert [case.name for case in choose_cases(names, dtype="bfloat16")] == names[:1]
    assert all(case.tiny for case in choose_cases(names, tiny=True))


def test_an_unknown_name_is_refused_with_the_closest_one():
    with pytest.raises(RankFlowError, match=r"did you mean 'minilm-r8'; .*llama-r32"):
        choose_cases(["minilm-8"])


def test_a_type_without_cases_is_refused():
    with pytest.raises(RankFlowError, match="float16"):
        choose_cases(dtype="float16")
