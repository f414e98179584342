import json
from pathlib import Path

import pytest
from datasets import Dataset

from rankflow.errors import RankFlowError, SpecError
from rankflow.training import sources
from rankflow.training.init.rows import COUNT, describe, read_first_rows

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a", None, "b"], "text"),
        ([1, 0], "class"),
        ([True, False], "class"),
        ([1, 0.5], "number"),
        ([["a", "b"], []], "words"),
        ([[1, 2], []], "tags"),
        ([CHAT, CHAT[:1]], "messages"),
        ([[{"from": "human", "value": "hi"}]], "other"),
        ([{"a": 1}], "other"),
        (["a", 1], "other"),
        ([None], "other"),
    ],
)
def test_a_column_is_what_all_its_values_are(values, kind):
    column = describe("x", values)
    assert column.kind == kind
    assert column.values == tuple(value for value in values if value is not None)


@pytest.mark.parametrize(
    ("values", "has_classes"),
    [
        (["yes", "no"] * 4, True),
        ([0, 1, 2] * 4, True),
        (["yes", "no"] * 3, False),  # too few rows to tell
        ([f"id {n}" for n in range(9)], False),
        (["same"] * 9, False),
        (["yes " * 20, "no"] * 4, False),
        (["", "no"] * 4, False),
        ([["a"], ["b"]] * 4, False),
    ],
)
def test_classes_are_few_short_values_that_come_again(values, has_classes):
    assert describe("x", values).has_classes is has_classes


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_the_first_rows_of_any_file_are_read(suffix, tmp_path):
    path = str(tmp_path / f"rows{suffix}")
    rows = Dataset.from_list([{"text": f"t{n}", "label": n % 2} for n in range(COUNT + 5)])
    {
        ".jsonl": rows.to_json,
        ".json": lambda p: Path(p).write_text(json.dumps(rows.to_list())),
        ".csv": rows.to_csv,
        ".parquet": rows.to_parquet,
    }[suffix](path)
    found = read_first_rows(path, None)
    assert (found.count, found.splits) == (COUNT, ("train",))
    assert [(c.name, c.kind, c.values[:2]) for c in found.columns] == [
        ("text", "text", ("t0", "t1")),
        ("label", "class", (0, 1)),
    ]


def test_conversations_of_a_file_are_seen_as_such(write_rows):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    path = write_rows("chat.jsonl", [{"messages": CHAT}, {"messages": [CHAT[0], call]}])
    (column,) = read_first_rows(str(path), None).columns
    assert (column.kind, column.values[0]) == ("messages", CHAT)


def test_a_hub_data_set_is_opened_without_being_loaded(monkeypatch):
    seen = []

    def load(name, config, *, streaming):
        seen.append((name, config, streaming))
        rows = Dataset.from_dict({"text": ["a", "b"]}).to_iterable_dataset()
        return {"train": rows.take(0) if config == "empty" else rows, "validation": rows}

    monkeypatch.setattr(sources, "load_dataset", load)
    found = read_first_rows("owner/rows", "en")
    assert seen == [("owner/rows", "en", True)]
    assert (found.count, found.splits) == (2, ("train", "validation"))
    with pytest.raises(RankFlowError, match="--data owner/rows: it has no rows"):
        read_first_rows("owner/rows", "empty")


@pytest.mark.parametrize(
    ("data", "config", "error", "message"),
    [
        ("none.jsonl", None, SpecError, "--data none.jsonl: no such file"),
        ("{folder}", None, SpecError, r"must end in one of \.jsonl"),
        ("{folder}/empty.jsonl", None, RankFlowError, "the file is empty"),
        ("{folder}/broken.jsonl", None, RankFlowError, r"broken\.jsonl: cannot be read"),
        ("{folder}/none.csv", None, RankFlowError, r"none\.csv: no rows"),
        ("{folder}/none.csv", "en", SpecError, "--config en: only a hub id has configurations"),
        ("docstrings", "en", SpecError, "--config en: only a hub id has configurations"),
    ],
)
def test_what_cannot_be_read_is_refused(data, config, error, message, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"text": "a"\n')
    (tmp_path / "none.csv").write_text("text,label\n")
    with pytest.raises(error, match=message):
        read_first_rows(data.format(folder=tmp_path), config)
