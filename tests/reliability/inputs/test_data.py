"""Bad rows: each is refused before the first step, with column, file or row and the fix."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from datasets import Dataset

PAIRS = [("good", "yes"), ("bad", "no"), ("fine", "yes"), ("poor", "no")]
ROWS = [{"text": f"{word} a film" + " a" * n, "label": y} for n in range(5) for word, y in PAIRS]
WORDS = [
    {"text": row["text"].split(), "label": [row["label"]] * len(row["text"].split())}
    for row in ROWS
]
CHAT = {"role": "user", "content": "a"}, {"role": "assistant", "content": "film"}

CAUSAL = ("model.name=llama", "model.task=causal-lm", "model.pooling=model")
TOKENS = ("model.task=token-classification", "model.pooling=model")
MESSAGES = (*CAUSAL, "data.messages=messages")
TEMPLATE = (*MESSAGES, "model.chat_template=chat.jinja")
ANSWERS = (*CAUSAL, "data.target=label")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def all_with(**columns):
    return lines([row | columns for row in ROWS])


def fourth(key, value, rows=ROWS):
    return lines([row | ({key: value} if n == 3 else {}) for n, row in enumerate(rows)])


def without(key):
    return lines([{k: v for k, v in row.items() if k != key} for row in ROWS])


def table(header="text,label", end=""):
    body = "".join(f"{row['text']},{row['label']}\n" for row in ROWS)
    return f"{header}\n{body}{end}"


def parquet(damage):
    def write(path):
        Dataset.from_list(ROWS).to_parquet(str(path))
        path.write_bytes(damage(path.read_bytes()))

    return write


def template(text):
    return {"bad.jsonl": lines([{"messages": CHAT}] * 3), "chat.jinja": text}


@dataclass(frozen=True)
class Bad:
    """A mistake in the rows.

    Attributes:
        files: Contents by name, or those of ``bad.jsonl``; a function writes them itself.
        told: What the message must hold: what is wrong, and the fix.
        settings: Of the run, beside the first file for training.
    """

    files: object
    told: tuple[str, str]
    settings: tuple[str, ...] = ()


NO_TEXT = ("row 4 has no text in column 'text'", "remove such rows")
NO_LABEL = ("row 4 has no label in column 'label'", "remove such rows")
NOT_TEXT = ("column 'text' holds", "[data] text needs strings")
NOT_CLASS = ("column 'label' holds", "write the classes as strings or whole numbers")
NO_JSON = ("bad.jsonl: cannot be read as jsonl", "mend the file, or name another")
NO_PARQUET = ("bad.parquet: cannot be read as parquet", "mend the file, or name another")
UNSEEN = ("row 1 has the label 'maybe' in column 'label', which no training row has", "'yes'?")

MISTAKES = [
    # not enough
    Bad("", ("bad.jsonl: the file is empty", "write at least two rows")),
    Bad("\n\n", ("bad.jsonl: no rows", "write at least two")),
    Bad({"bad.csv": "text,label\n"}, ("bad.csv: no rows", "write at least two")),
    Bad({"bad.json": "[]"}, ("bad.json: no rows", "write at least two")),
    Bad(lines(ROWS[:1]), ("bad.jsonl: one row only", "at least two")),
    Bad(
        lines(ROWS[:2]), ("of 2 rows 1 are left", "add rows, or change [data] validation_fraction")
    ),
    Bad(
        lines(ROWS[:4]),
        ("of 4 rows 1 are left", "add rows, or change"),
        ("data.validation_fraction=0.9",),
    ),
    Bad(lines(ROWS[::2]), ("column 'label' holds one class only (yes)", "needs two")),
    # columns
    Bad(without("text"), ("[data] text = 'text': bad.jsonl has no such column", "did you mean")),
    Bad(
        without("label"), ("[data] label = 'label': bad.jsonl has no such column", "It has 'text'")
    ),
    Bad(json.dumps({"rows": ROWS}), ("has no such column", "It has 'rows'")),
    Bad({"bad.csv": table("good,yes")}, ("has no such column", "It has 'good', 'yes'")),
    Bad({"bad.csv": table().replace(",", ";")}, ("no such column", "did you mean 'text;label'?")),
    Bad({"bad.csv": table("Text,label")}, ("[data] text = 'text'", "did you mean 'Text'?")),
    Bad({"bad.csv": table("text,text")}, ("2 columns are called 'text'", "give each a name")),
    Bad('{"text":"a","text":"b","label":"x"}\n' * 2, NO_JSON),
    # types
    Bad(all_with(text=3), NOT_TEXT),
    Bad(all_with(text=1.5), NOT_TEXT),
    Bad(all_with(text=True), NOT_TEXT),
    Bad(all_with(text={"a": "b"}), NOT_TEXT),
    Bad(all_with(text=["a"]), ("holds lists of string", "go under [data] messages")),
    Bad(fourth("text", 3), ("column 'text' holds values of several types", "needs strings")),
    Bad(all_with(label=1.5), NOT_CLASS),
    Bad(all_with(label=float("nan")), NOT_CLASS),
    Bad(all_with(label={"a": 1}), NOT_CLASS),
    Bad(all_with(label=["yes"]), NOT_CLASS),
    Bad(fourth("label", 3), ("holds values of several types", "all of one type")),
    Bad({"bad.csv": "text,label\n1,yes\n2,no\n"}, NOT_TEXT),
    Bad(lines({"text": "a", "label": n} for n in range(9)), ("no two labels in", "Name another")),
    Bad(fourth("label", " no"), ("the class ' no' and another that", "write them alike")),
    # what is missing
    Bad(fourth("text", None), NO_TEXT),
    Bad(fourth("label", None), NO_LABEL),
    Bad(fourth("label", ""), NO_LABEL),
    Bad(fourth("label", float("nan")), NOT_CLASS),
    Bad(all_with(text=None), ("row 1 has no text in column 'text'", "remove such rows")),
    Bad(all_with(text=" "), ("column 'text' is empty in all rows", "name another under [data]")),
    Bad({"bad.csv": table(end=",yes\n")}, ("row 21 has no text in column 'text'", "remove")),
    Bad({"bad.csv": table(end="a\n")}, ("row 21 has no label in column 'label'", "remove")),
    Bad({"bad.csv": table(end="NA,yes\n")}, ("row 21 has no text in column 'text'", "remove")),
    Bad(
        all_with(pair=None),
        ("row 1 has no text in column 'pair'", "remove"),
        ("data.text_pair=pair",),
    ),
    # damaged files
    Bad(lines(ROWS).encode().replace(b"poor", b"\xe9"), ("line 4 is not UTF-8", "iconv -f latin1")),
    Bad(lines(ROWS).encode("utf-16"), ("line 1 is not UTF-8", "iconv -f utf-16 -t utf-8")),
    Bad({"bad.csv": table().encode("utf-16")}, ("line 1 is not UTF-8", "iconv -f utf-16")),
    Bad(lines(ROWS)[:-5], NO_JSON),
    Bad(lines(ROWS) + "nope\n", NO_JSON),
    Bad('"a"\n"b"\n', NO_JSON),
    Bad("\0" * 99, NO_JSON),
    Bad({"bad.json": json.dumps(ROWS)[:-5]}, ("bad.json: cannot be read as json", "mend the file")),
    Bad({"bad.json": "3"}, ("bad.json: cannot be read as json", "mend the file")),
    Bad({"bad.csv": table(end="a,b,c,d\n")}, ("line 22", "mend the file, or name another")),
    Bad({"bad.csv": table(end='"open,yes\n')}, ("row 21", "mend the file, or name another")),
    Bad({"bad.parquet": b"no" * 99}, NO_PARQUET),
    Bad({"bad.parquet": parquet(lambda whole: whole[:200])}, NO_PARQUET),
    Bad({"bad.parquet": parquet(lambda whole: whole[:20] + b"\xff" * 9 + whole[29:])}, NO_PARQUET),
    # several files
    Bad(
        {"bad.jsonl": all_with(label=3)},
        ("differ in the types of their columns", "write a column as one type"),
        ("data.train=['rows.jsonl', 'bad.jsonl']",),
    ),
    Bad(
        {"bad.jsonl": without("label")},
        ("row 21 has no label in column 'label'", "remove such rows"),
        ("data.train=['rows.jsonl', 'bad.jsonl']",),
    ),
    *(
        Bad(
            {"bad.jsonl": rows},
            (f"bad.jsonl{what}", fix),
            ("data.train=rows.jsonl", f"data.{split}=bad.jsonl"),
        )
        for split in ("validation", "test")
        for rows, what, fix in [
            ("", ": the file is empty", "write at least two rows"),
            (lines([ROWS[0] | {"label": "maybe"}]), f": {UNSEEN[0]}", UNSEEN[1]),
            (lines([ROWS[0] | {"label": None}]), ": row 1 has no label", "name a labelled file"),
            (lines([ROWS[0] | {"text": 4}]), ": column 'text' holds int64", "needs strings"),
            (lines([{"text": "a"}]), " has no such column", "did you mean"),
        ]
    ),
    # words
    Bad(lines(ROWS), ("column 'text' holds string", "a list of words in each row"), TOKENS),
    Bad(
        fourth("label", ["yes"], WORDS),
        ("row 4 has 3 words in column 'text' and 1 labels", "each word needs one label"),
        TOKENS,
    ),
    Bad(
        lines([row | {"label": "yes"} for row in WORDS]),
        ("no list of labels in column 'label'", "each word needs one label"),
        TOKENS,
    ),
    Bad(fourth("label", ["yes", "no", None], WORDS), NO_LABEL, TOKENS),
    Bad(fourth("text", ["a", "a", None], WORDS), NO_TEXT, TOKENS),
    Bad(
        lines([{"text": ["", ""], "label": ["yes", "no"]}] * 4),
        ("column 'text' is empty in all rows", "name another under [data] text"),
        TOKENS,
    ),
    # texts and answers
    Bad(lines([{"text": ""}] * 4), ("column 'text' is empty", "name another"), CAUSAL),
    Bad(
        all_with(label=""), ("column 'label' is empty", "name another under [data] target"), ANSWERS
    ),
    Bad(fourth("label", ""), ("the target '' has no token to learn", "remove such rows"), ANSWERS),
    Bad(all_with(label="a " * 40), ("[data] max_length = 16", "raise it, or remove"), ANSWERS),
    Bad(all_with(label=3), ("column 'label' holds int64", "[data] target needs strings"), ANSWERS),
    # conversations
    Bad(
        lines([{"messages": []}] * 3), ("row 1, column 'messages'", "a list of messages"), MESSAGES
    ),
    Bad(
        lines([{"messages": CHAT[:1]}] * 3),
        ("row 1, column 'messages': no message of 'assistant'", "set [data] loss_on = 'all'"),
        MESSAGES,
    ),
    Bad(
        lines([{"messages": [{"from": "human", "value": "a"}]}] * 3),
        ("message 1 has no role", "'from', 'value': rename these"),
        MESSAGES,
    ),
    Bad(
        lines([{"messages": [CHAT[0] | {"content": None}, CHAT[1]]}] * 3),
        ("message 1 has the content None", "it must be a string"),
        MESSAGES,
    ),
    Bad(
        lines([{"messages": CHAT}] * 3),
        ("'llama' has no chat template", "name a file with one under [model] chat_template"),
        MESSAGES,
    ),
    Bad(template(b"\xe9"), ("model.chat_template", "save it as UTF-8"), TEMPLATE),
    Bad(template("{{ nope"), ("the chat template", "mend it, or name another"), TEMPLATE),
    Bad(template("film"), ("the chat template", "let the template write one"), TEMPLATE),
]


@pytest.mark.fault("bad spec, data or budget", quick=len(MISTAKES), full=len(MISTAKES))
def test_bad_rows_are_refused_with_their_place_and_the_fix(injection, refuse, bench):
    bad = MISTAKES[injection]
    files = bad.files if isinstance(bad.files, dict) else {"bad.jsonl": bad.files}
    for name, content in files.items():
        write(Path(name), content)
    message = refuse(f"data.train={next(iter(files))}", *bad.settings)
    for words in bad.told:
        assert words in message


def write(path, content):
    if callable(content):
        content(path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
