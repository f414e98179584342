import json
import re

import datasets
import pytest
from datasets import Dataset

from rankflow.ablation.measures.general_data import (
    GeneralTexts,
    ScoredPairs,
    load_pairs,
    load_texts,
)
from rankflow.errors import RankFlowError, SpecError

ROWS = [
    {"text": "one", "text2": "two", "label": 1},
    {"text": "three", "text2": "four", "label": 2},
    {"text": "five", "text2": "six", "label": 5},
]
COLUMNS = ("text", "text2", "label")
PAIRS = ScoredPairs(("one", "three", "five"), ("two", "four", "six"), (1.0, 2.0, 5.0))


@pytest.fixture(autouse=True)
def caches_in_a_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def write(tmp_path):
    def write(rows, name="rows.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_pairs(tmp_path, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = Dataset.from_list(ROWS)
    {".jsonl": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](str(path))
    assert load_pairs((path,), *COLUMNS) == PAIRS


def test_files_are_joined_in_order(write):
    files = (write(ROWS[:1], "a.jsonl"), write(ROWS[1:], "b.jsonl"))
    assert load_pairs(files, *COLUMNS) == PAIRS
    assert load_texts(files, "text2") == GeneralTexts(PAIRS.second)


def test_a_limit_draws_the_same_rows_every_time(write):
    rows = [{"text": f"{i}", "text2": "x", "label": i} for i in range(50)]
    path = write(rows)
    first, second = (load_pairs((path,), *COLUMNS, max_rows=10) for _ in range(2))
    assert first == second
    assert len(first.scores) == len(set(first.scores)) == 10
    assert first.first == tuple(f"{score:.0f}" for score in first.scores)
    assert first.first != tuple(map(str, range(10)))
    assert len(load_texts((path,), "text", max_rows=10).texts) == 10


@pytest.mark.parametrize(("role", "place"), [("text", 0), ("text_pair", 1), ("score", 2)])
def test_an_unknown_column_names_the_closest(write, role, place):
    columns = list(COLUMNS)
    close, columns[place] = columns[place], columns[place] + "s"
    with pytest.raises(SpecError, match=rf"\[forgetting\] {role} = '{close}s': .*'{close}'"):
        load_pairs((write(ROWS),), *columns)


@pytest.mark.parametrize("value", [None, "", 3])
def test_a_row_without_a_text_is_refused(write, value):
    rows = [{**row, "text2": value} for row in ROWS]
    with pytest.raises(RankFlowError, match=r"row 1 has .* in column 'text2'; .* needs a text"):
        load_pairs((write(rows),), *COLUMNS)


@pytest.mark.parametrize("value", [None, "x", True, float("nan")])
def test_a_row_without_a_number_is_refused(write, value):
    rows = [{**row, "label": value} for row in ROWS]
    with pytest.raises(RankFlowError, match=r"row 1 has .* in column 'label'; .* needs a number"):
        load_pairs((write(rows),), *COLUMNS)


def test_scores_that_are_all_the_same_are_refused(write):
    path = write([{**row, "label": 3} for row in ROWS])
    with pytest.raises(RankFlowError, match=rf"{re.escape(str(path))}: .* 1 different scores"):
        load_pairs((path,), *COLUMNS)


def test_a_file_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(RankFlowError, match=r"none\.jsonl: cannot be read"):
        load_pairs((tmp_path / "none.jsonl",), *COLUMNS)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(RankFlowError, match=r"empty\.jsonl: the file is empty"):
        load_texts((tmp_path / "empty.jsonl",), "text")
