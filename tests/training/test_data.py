from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from rankflow.errors import RankFlowError, SpecError
from rankflow.specs.run import DataSpec
from rankflow.training import sources
from rankflow.training.data import load_data

CLASSIFY = "sequence-classification"


def files(**named):
    return DataSpec(**{name: str(path) for name, path in named.items()})


@pytest.fixture
def train(write_rows, sentiment_rows):
    return write_rows("train.jsonl", sentiment_rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, sentiment_rows, suffix):
    path = tmp_path / f"rows{suffix}"
    rows = Dataset.from_list(sentiment_rows)
    {
        ".jsonl": rows.to_json,
        ".json": lambda p: rows.to_json(p, lines=False),
        ".csv": rows.to_csv,
        ".parquet": rows.to_parquet,
    }[suffix](str(path))
    data = load_data(files(train=path), CLASSIFY)
    assert data.labels == ("no", "yes")
    read = [row for name in ("train", "validation") for row in data.splits[name]]
    expected = [{"text": r["text"], "label": int(r["label"] == "yes")} for r in sentiment_rows]
    assert sorted(read, key=str) == sorted(expected, key=str)


def test_validation_rows_are_held_out_of_training_the_same_way_every_time(train):
    spec = DataSpec(train=str(train), validation_fraction=0.25)
    first, second = load_data(spec, CLASSIFY), load_data(spec, CLASSIFY)
    assert {name: len(rows) for name, rows in first.splits.items()} == {
        "train": 15,
        "validation": 5,
    }
    assert first.splits["validation"].to_list() == second.splits["validation"].to_list()
    assert first.judged_split == "validation"


def test_without_a_share_for_validation_nothing_is_judged(train):
    data = load_data(DataSpec(train=str(train), validation_fraction=0), CLASSIFY)
    assert list(data.splits) == ["train"]
    assert data.judged_split is None


def test_row_limits_hold_for_training_and_for_every_evaluated_split(
    train, write_rows, sentiment_rows
):
    held = [str(write_rows(name, sentiment_rows)) for name in ("validation.jsonl", "test.jsonl")]
    spec = DataSpec(
        train=str(train), validation=held[0], test=held[1], max_train_rows=7, max_eval_rows=3
    )
    data = load_data(spec, CLASSIFY)
    assert [len(data.splits[name]) for name in ("train", "validation", "test")] == [7, 3, 3]
    assert data.judged_split == "test"


def test_several_files_make_one_split(write_rows, sentiment_rows):
    paths = [
        str(write_rows("a.jsonl", sentiment_rows[:8])),
        str(write_rows("b.jsonl", sentiment_rows[8:])),
    ]
    spec = DataSpec(train=paths, validation_fraction=0)
    assert len(load_data(spec, CLASSIFY).splits["train"]) == len(sentiment_rows)


def test_files_of_different_column_types_are_refused_together(write_rows):
    paths = [
        str(write_rows("a.jsonl", [{"text": "a", "label": 1}] * 2)),
        str(write_rows("b.jsonl", [{"text": "a", "label": "x"}] * 2)),
    ]
    with pytest.raises(RankFlowError, match=r"a\.jsonl, .*b\.jsonl: the files differ in the types"):
        load_data(DataSpec(train=paths), CLASSIFY)


def test_an_empty_file_is_refused_by_name(tmp_path):
    path = tmp_path / "none.jsonl"
    path.write_text("")
    with pytest.raises(RankFlowError, match=r"none\.jsonl: the file is empty"):
        load_data(files(train=path), CLASSIFY)


def test_a_file_with_headings_only_is_refused(tmp_path):
    path = tmp_path / "headings.csv"
    path.write_text("text,label\n")
    with pytest.raises(RankFlowError, match=r"headings\.csv: no rows"):
        load_data(files(train=path), CLASSIFY)


def test_a_file_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    path = tmp_path / "latin.csv"
    path.write_bytes("text,label\ngood,yes\nsch\u00f6n,no\n".encode("latin1"))
    with pytest.raises(RankFlowError, match=r"latin\.csv: line 3 is not UTF-8.*iconv"):
        load_data(files(train=path), CLASSIFY)


def test_a_file_that_is_not_what_its_ending_says_is_refused(tmp_path):
    for name in ("rows.jsonl", "rows.parquet"):
        path = tmp_path / name
        path.write_text("no such format\n")
        with pytest.raises(RankFlowError, match=rf"{name}: cannot be read as"):
            load_data(files(train=path), CLASSIFY)


def test_a_missing_column_is_refused_with_the_closest_name(train):
    spec = DataSpec(train=str(train), text="texts")
    with pytest.raises(SpecError, match=r"text = 'texts'.*train\.jsonl.*did you mean 'text'\?"):
        load_data(spec, CLASSIFY)


def test_one_row_is_refused(write_rows):
    path = write_rows("one.jsonl", [{"text": "a", "label": "x"}])
    with pytest.raises(RankFlowError, match=r"one\.jsonl: one row only"):
        load_data(files(train=path), CLASSIFY)


def test_one_class_is_refused_by_its_name(write_rows):
    path = write_rows("same.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "x"}])
    with pytest.raises(RankFlowError, match=r"same\.jsonl: column 'label' holds one class.*\(x\)"):
        load_data(files(train=path), CLASSIFY)


def test_a_class_unknown_in_training_is_refused_with_its_row(train, write_rows):
    test = write_rows("test.jsonl", [{"text": "a", "label": "yes"}, {"text": "a", "label": "yess"}])
    with pytest.raises(
        RankFlowError, match=r"test\.jsonl: row 2 has the label 'yess'.*did you mean 'yes'\?"
    ):
        load_data(files(train=train, test=test), CLASSIFY)


def test_a_row_without_label_or_text_is_refused_with_its_number(write_rows, sentiment_rows):
    for column, what in (("label", "no label"), ("text", "no text")):
        rows = [*sentiment_rows[:2], sentiment_rows[2] | {column: None}]
        path = write_rows(f"{column}.jsonl", rows)
        with pytest.raises(RankFlowError, match=rf"row 3 has {what} in column '{column}'"):
            load_data(files(train=path), CLASSIFY)


def test_numbers_are_not_classes_and_not_texts(write_rows):
    path = write_rows("scores.jsonl", [{"text": "a", "label": 0.5}, {"text": "b", "label": 1.5}])
    with pytest.raises(RankFlowError, match="holds float64, not classes"):
        load_data(files(train=path), CLASSIFY)
    path = write_rows("texts.jsonl", [{"text": 1, "label": "x"}, {"text": 2, "label": "y"}])
    with pytest.raises(RankFlowError, match=r"column 'text' holds int64.*needs strings"):
        load_data(files(train=path), CLASSIFY)


def test_whole_number_labels_are_ordered_as_numbers(write_rows):
    path = write_rows("n.jsonl", [{"text": "a", "label": n} for n in (10, 9, 2, 10)])
    assert load_data(files(train=path), CLASSIFY).labels == ("2", "9", "10")


def test_columns_are_found_under_their_own_names_even_when_swapped(write_rows):
    rows = [{"label": "a text", "text": "x"}, {"label": "b text", "text": "y"}]
    spec = DataSpec(
        train=str(write_rows("swap.jsonl", rows)), text="label", label="text", validation_fraction=0
    )
    data = load_data(spec, CLASSIFY)
    assert data.labels == ("x", "y")
    assert data.splits["train"]["text"][:] == ["a text", "b text"]


def test_a_pair_of_texts_is_read_for_sequence_classification(write_rows):
    rows = [{"a": "one", "b": "two", "label": y} for y in ("x", "y")]
    spec = DataSpec(
        train=str(write_rows("p.jsonl", rows)), text="a", text_pair="b", validation_fraction=0
    )
    assert load_data(spec, CLASSIFY).splits["train"]["text_pair"][:] == ["two", "two"]


def test_token_labels_are_encoded_word_by_word(write_rows):
    rows = [{"text": ["a", "film"], "label": ["O", "B"]}, {"text": ["good"], "label": ["O"]}]
    spec = DataSpec(train=str(write_rows("t.jsonl", rows)), validation_fraction=0)
    data = load_data(spec, "token-classification")
    assert data.labels == ("B", "O")
    assert data.splits["train"]["label"][:] == [[1, 0], [1]]


def test_rows_of_words_may_all_have_the_same_labels_if_these_differ_in_themselves(write_rows):
    rows = [{"text": ["a", "b"], "label": ["x", "y"]}] * 4
    data = load_data(files(train=write_rows("words.jsonl", rows)), "token-classification")
    assert data.splits["train"][0]["label"] == [0, 1]


def test_words_and_labels_of_different_number_are_refused_with_the_row(write_rows):
    rows = [{"text": ["a"], "label": ["O"]}, {"text": ["a", "film"], "label": ["O"]}]
    path = write_rows("t.jsonl", rows)
    with pytest.raises(RankFlowError, match=r"row 2 has 2 words .* and 1 labels"):
        load_data(files(train=path), "token-classification")


def test_plain_strings_are_not_words(write_rows, sentiment_rows):
    path = write_rows("t.jsonl", sentiment_rows)
    with pytest.raises(RankFlowError, match="needs a list of words in each row"):
        load_data(files(train=path), "token-classification")


def test_language_models_read_no_label(write_rows):
    rows = [{"text": "a", "answer": "b"}, {"text": "c", "answer": "d"}]
    path = str(write_rows("lm.jsonl", rows))
    causal = load_data(DataSpec(train=path, validation_fraction=0), "causal-lm")
    assert causal.splits["train"].to_list() == [{"text": "a"}, {"text": "c"}]
    pairs = load_data(DataSpec(train=path, target="answer", validation_fraction=0), "seq2seq-lm")
    assert pairs.splits["train"].to_list() == [
        {"text": "a", "target": "b"},
        {"text": "c", "target": "d"},
    ]
    assert causal.labels == pairs.labels == ()


def test_a_causal_model_reads_its_targets_if_asked_for(write_rows):
    path = str(write_rows("qa.jsonl", [{"q": "1+1=", "a": "2"}, {"q": "2+2=", "a": "4"}]))
    spec = DataSpec(train=path, text="q", target="a", validation_fraction=0)
    assert load_data(spec, "causal-lm").splits["train"].to_list() == [
        {"text": "1+1=", "target": "2"},
        {"text": "2+2=", "target": "4"},
    ]


def test_a_row_without_target_is_refused_with_its_number(write_rows):
    path = str(write_rows("qa.jsonl", [{"text": "a", "target": "b"}, {"text": "a"}]))
    with pytest.raises(RankFlowError, match="row 2 has no text in column 'target'"):
        load_data(DataSpec(train=path, target="target"), "causal-lm")


@pytest.fixture
def hub(monkeypatch):
    """Stand a small data set in for the hub."""
    features = Features({"text": Value("string"), "label": ClassLabel(names=["neg", "pos"])})
    rows = {"text": ["a", "b", "c"], "label": [0, 1, 1]}
    splits = DatasetDict({"train": Dataset.from_dict(rows, features=features)})
    monkeypatch.setattr(sources, "load_dataset", lambda name, config, streaming: splits)
    return splits


def test_a_hub_data_set_keeps_its_class_names(hub):
    data = load_data(DataSpec(name="owner/rows", validation_fraction=0), CLASSIFY)
    assert data.labels == ("neg", "pos")


def test_hidden_labels_of_a_hub_test_split_are_refused(hub):
    hidden = {"text": ["d"], "label": [-1]}
    hub["test"] = Dataset.from_dict(hidden, features=hub["train"].features)
    with pytest.raises(RankFlowError, match=r"'owner/rows', split 'test': row 1 has no label"):
        load_data(DataSpec(name="owner/rows"), CLASSIFY)


def test_a_data_set_without_training_rows_is_refused_with_what_it_has(hub):
    hub["dev"] = hub.pop("train")
    with pytest.raises(SpecError, match=r"no split 'train', only 'dev'"):
        load_data(DataSpec(name="owner/rows"), CLASSIFY)


def test_an_unreachable_hub_data_set_is_refused_with_the_alternatives(monkeypatch):
    def offline(name, config, streaming):
        raise ConnectionError("offline")

    monkeypatch.setattr(sources, "load_dataset", offline)
    with pytest.raises(SpecError, match=r"cannot load 'owner/rows': offline; the built-in.*files"):
        load_data(DataSpec(name="owner/rows"), CLASSIFY)


def test_the_built_in_rows_are_loaded_by_name(hub, monkeypatch):
    monkeypatch.setattr(sources, "load_docstrings", lambda: hub)
    data = load_data(DataSpec(name="docstrings", validation_fraction=0), CLASSIFY)
    assert data.splits["train"]["text"][:] == ["a", "b", "c"]


def test_a_file_that_vanished_since_the_spec_was_read_is_named(train):
    spec = files(train=train)
    Path(train).unlink()
    with pytest.raises(
        RankFlowError, match=r"train\.jsonl: cannot be read as jsonl: .*No such file"
    ):
        load_data(spec, CLASSIFY)
