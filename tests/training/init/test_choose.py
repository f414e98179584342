import re

import pytest

from rankflow.errors import SpecError
from rankflow.training.init.choose import choose_reading
from rankflow.training.init.rows import describe

TEXTS = [f"a text of its own, number {n}" for n in range(12)]
CLASSES = ["yes", "no", "perhaps"] * 4
NUMBERS = [0, 1] * 6
WORDS = [["a", "film"], ["good"]] * 6
TAGS = [[0, 1], [2]] * 6
CHATS = [[{"role": "user", "content": "hi"}]] * 12
SCORES = [n / 7 for n in range(12)]


def choose(data, family, *, task=None, **asked):
    columns = [describe(name, values) for name, values in data.items()]
    reading = choose_reading(columns, family, task, asked)
    return reading.task, {key: column.name for key, column in reading.columns.items()}


CLEAR = {
    "a text and its class": (
        {"id": TEXTS, "text": TEXTS, "label": CLASSES},
        "encoder",
        {},
        ("sequence-classification", {"text": "text", "label": "label"}),
    ),
    "other names": (
        {"sentence": TEXTS, "mood": NUMBERS, "score": SCORES},
        "encoder",
        {},
        ("sequence-classification", {"text": "sentence", "label": "mood"}),
    ),
    "a pair": (
        {"one": TEXTS, "two": TEXTS, "label": NUMBERS},
        "encoder",
        {"text": "two", "text_pair": "one"},
        ("sequence-classification", {"text": "two", "label": "label", "text_pair": "one"}),
    ),
    "every text its own class": (
        {"text": TEXTS, "label": TEXTS},
        "encoder",
        {},
        ("sequence-classification", {"text": "text", "label": "label"}),
    ),
    "words": (
        {"id": TEXTS, "tokens": WORDS, "ner_tags": TAGS},
        "encoder",
        {},
        ("token-classification", {"text": "tokens", "label": "ner_tags"}),
    ),
    "words and labels of strings": (
        {"tokens": WORDS, "tags": WORDS, "pos": WORDS},
        "encoder",
        {},
        ("token-classification", {"text": "tokens", "label": "tags"}),
    ),
    "a plain text": ({"body": TEXTS}, "decoder", {}, ("causal-lm", {"text": "body"})),
    "a text among others": (
        {"title": TEXTS, "text": TEXTS},
        "decoder",
        {},
        ("causal-lm", {"text": "text"}),
    ),
    "a prompt and its completion": (
        {"prompt": TEXTS, "completion": TEXTS, "score": SCORES},
        "decoder",
        {},
        ("causal-lm", {"text": "prompt", "target": "completion"}),
    ),
    "a pair that was asked for": (
        {"a": TEXTS, "b": TEXTS, "c": TEXTS},
        "decoder",
        {"text": "c", "target": "a"},
        ("causal-lm", {"text": "c", "target": "a"}),
    ),
    "one of a pair that was asked for": (
        {"prompt": TEXTS, "completion": TEXTS},
        "decoder",
        {"text": "prompt"},
        ("causal-lm", {"text": "prompt"}),
    ),
    "conversations": (
        {"prompt": TEXTS, "messages": CHATS},
        "decoder",
        {},
        ("causal-lm", {"messages": "messages"}),
    ),
    "conversations and their answers": (
        {"prompt": CHATS, "completion": CHATS},
        "decoder",
        {},
        ("causal-lm", {"messages": "prompt", "target": "completion"}),
    ),
    "a conversation of several": (
        {"chosen": CHATS, "rejected": CHATS, "prompt": TEXTS},
        "decoder",
        {"messages": "chosen"},
        ("causal-lm", {"messages": "chosen"}),
    ),
    "an answer in texts beside conversations": (
        {"messages": CHATS, "prompt": TEXTS, "completion": TEXTS},
        "decoder",
        {"text": "prompt", "target": "completion"},
        ("causal-lm", {"text": "prompt", "target": "completion"}),
    ),
    "a class for a decoder": (
        {"text": TEXTS, "label": NUMBERS},
        "decoder",
        {"task": "sequence-classification"},
        ("sequence-classification", {"text": "text", "label": "label"}),
    ),
    "a label says the task": (
        {"text": TEXTS, "kind": CLASSES},
        "decoder",
        {"label": "kind"},
        ("sequence-classification", {"text": "text", "label": "kind"}),
    ),
    "a summary": (
        {"document": TEXTS, "summary": TEXTS},
        "encoder-decoder",
        {},
        ("seq2seq-lm", {"text": "document", "target": "summary"}),
    ),
    "a text to be translated": (
        {"en": TEXTS, "fr": TEXTS},
        "encoder-decoder",
        {"text": "en", "target": "fr"},
        ("seq2seq-lm", {"text": "en", "target": "fr"}),
    ),
}


@pytest.mark.parametrize("case", CLEAR)
def test_a_clear_case_is_chosen(case):
    data, family, asked, expected = CLEAR[case]
    assert choose(data, family, **asked) == expected


UNCLEAR = {
    "two texts": (
        {"one": TEXTS, "two": TEXTS, "label": NUMBERS},
        "encoder",
        {},
        "several columns hold texts: 'one', 'two'; add --text COLUMN, and --text-pair COLUMN for",
    ),
    "two classes": (
        {"text": TEXTS, "mood": NUMBERS, "source": CLASSES},
        "encoder",
        {},
        "several columns hold classes: 'mood', 'source'; add --label COLUMN",
    ),
    "no class": (
        {"text": TEXTS},
        "encoder",
        {},
        "sequence-classification: no column holds classes",
    ),
    "numbers": (
        {"text": TEXTS, "label": SCORES},
        "encoder",
        {},
        "'label' holds numbers, not one class in each row",
    ),
    "three parts": (
        {"instruction": TEXTS, "input": TEXTS, "output": TEXTS},
        "decoder",
        {},
        "'instruction', 'input', 'output'; add --text COLUMN, and --target COLUMN if one answers",
    ),
    "preferences": (
        {"chosen": CHATS, "rejected": CHATS},
        "decoder",
        {},
        "several columns hold conversations: 'chosen', 'rejected'; add --messages COLUMN",
    ),
    "several tasks": (
        {"text": TEXTS, "label": NUMBERS},
        "decoder",
        {},
        "('text': texts, 'label': 2 classes); add --task causal-lm or --task sequence-class",
    ),
    "a translation": (
        {"en": TEXTS, "fr": TEXTS},
        "encoder-decoder",
        {},
        "no two columns are known as input and output; add --text and --target",
    ),
    "a column of another task": (
        {"text": TEXTS, "label": NUMBERS},
        "encoder",
        {"target": "text"},
        "sequence-classification: it reads no --target",
    ),
    "a column that is not there": (
        {"text": TEXTS, "label": NUMBERS},
        "encoder",
        {"text_pair": "txt"},
        "--text-pair txt: the data has no such column; did you mean 'text'?",
    ),
    "a family that cannot": (
        {"text": TEXTS},
        "encoder",
        {"task": "causal-lm"},
        "--task causal-lm: this model is of another family (encoder), which learns sequence-",
    ),
    "a column of another kind": (
        {"text": TEXTS, "label": NUMBERS},
        "decoder",
        {"messages": "text"},
        "causal-lm: --messages 'text' holds texts, and not conversations",
    ),
    "an answer of another kind": (
        {"chat": CHATS, "answer": TEXTS},
        "decoder",
        {"messages": "chat", "target": "answer"},
        "causal-lm: a row is texts or conversations, and not both",
    ),
    "words without labels": (
        {"words": WORDS, "other": [[1]] * 12},
        "encoder",
        {},
        "token-classification: no column holds a label for each of 'words'",
    ),
    "nothing": ({"conversations": [[{"from": "a"}]] * 9}, "decoder", {}, "no column holds texts"),
}


@pytest.mark.parametrize("case", UNCLEAR)
def test_what_is_not_clear_is_refused_with_what_to_add(case):
    data, family, asked, message = UNCLEAR[case]
    with pytest.raises(SpecError, match=re.escape(message)):
        choose(data, family, **asked)


def test_the_columns_that_are_not_read_are_known():
    columns = [describe(name, TEXTS) for name in ("id", "text", "title")]
    assert choose_reading(columns, "decoder", None, {}).unread == ("id", "title")
