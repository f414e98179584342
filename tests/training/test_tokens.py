import pytest
from datasets import Dataset, DatasetDict
from transformers import AutoTokenizer

from rankflow.errors import RankFlowError
from rankflow.training.tokens import IGNORED, make_collator, tokenize

PAD, CLS, SEP, GOOD, BAD, A, FILM, S = 0, 2, 3, 4, 5, 8, 9, 10


@pytest.fixture
def tokenizer(bert_folder):
    return AutoTokenizer.from_pretrained(bert_folder)


@pytest.fixture
def llama_tokenizer(llama_folder):
    tokenizer = AutoTokenizer.from_pretrained(llama_folder)
    tokenizer.eos_token = "[SEP]"
    return tokenizer


def encode(rows, tokenizer, task, max_length=16):
    return tokenize(DatasetDict({"train": Dataset.from_list(rows)}), tokenizer, task, max_length)[
        "train"
    ]


def test_texts_become_ids_and_keep_their_labels(tokenizer):
    rows = encode([{"text": "good films", "label": 1}], tokenizer, "sequence-classification")
    assert rows["input_ids"][:] == [[CLS, GOOD, FILM, S, SEP]]
    assert rows["labels"][:] == [1]


def test_pairs_become_one_row(tokenizer):
    rows = [{"text": "good", "text_pair": "bad", "label": 0}]
    encoded = encode(rows, tokenizer, "sequence-classification")
    assert encoded["input_ids"][:] == [[CLS, GOOD, SEP, BAD, SEP]]


def test_long_texts_are_cut_and_keep_their_ends(tokenizer):
    rows = [{"text": "good " * 40, "label": 0}]
    encoded = encode(rows, tokenizer, "sequence-classification", max_length=5)
    assert encoded["input_ids"][:] == [[CLS, GOOD, GOOD, GOOD, SEP]]


def test_the_first_token_of_a_word_carries_its_label(tokenizer):
    rows = [{"text": ["a", "films", "bad"], "label": [7, 8, 9]}]
    encoded = encode(rows, tokenizer, "token-classification")
    assert encoded["input_ids"][:] == [[CLS, A, FILM, S, BAD, SEP]]
    assert encoded["labels"][:] == [[IGNORED, 7, 8, IGNORED, 9, IGNORED]]


def test_a_tokenizer_that_cannot_align_words_is_refused(tokenizer):
    class Slow:
        is_fast = False

    with pytest.raises(RankFlowError, match=r"Slow cannot tell which word .* fast tokenizer"):
        encode([{"text": ["a"], "label": [0]}], Slow(), "token-classification")


def test_long_plain_text_becomes_several_rows_that_end_once(llama_tokenizer):
    rows = encode([{"text": "a good film"}], llama_tokenizer, "causal-lm", max_length=3)
    joined = [token for piece in rows["input_ids"] for token in piece]
    assert joined == [CLS, A, GOOD, FILM, SEP][: len(joined)]
    assert max(map(len, rows["input_ids"])) == 3
    assert rows["labels"][:] == rows["input_ids"][:]


def test_texts_too_short_to_predict_anything_are_refused_together(llama_tokenizer):
    llama_tokenizer.backend_tokenizer.post_processor = None
    llama_tokenizer.eos_token = None
    with pytest.raises(RankFlowError, match="split 'train': no text has the two tokens"):
        encode([{"text": "a"}, {"text": ""}], llama_tokenizer, "causal-lm")


def test_targets_of_pairs_are_labels(tokenizer):
    rows = encode([{"text": "good", "target": "a film"}], tokenizer, "seq2seq-lm")
    assert rows["input_ids"][:] == [[CLS, GOOD, SEP]]
    assert rows["labels"][:] == [[CLS, A, FILM, SEP]]


@pytest.mark.parametrize(
    ("task", "rows", "labels"),
    [
        (
            "sequence-classification",
            [{"text": "a", "label": 1}, {"text": "a a", "label": 0}],
            [1, 0],
        ),
        (
            "token-classification",
            [{"text": ["a"], "label": [1]}, {"text": ["a", "a"], "label": [0, 1]}],
            [[-100, 1, -100, -100], [-100, 0, 1, -100]],
        ),
        (
            "seq2seq-lm",
            [{"text": "a", "target": "a"}, {"text": "a a", "target": "a a"}],
            [[CLS, A, SEP, -100], [CLS, A, A, SEP]],
        ),
        (
            "causal-lm",
            [{"text": "a"}, {"text": "a a"}],
            [[CLS, A, SEP, -100], [CLS, A, A, SEP]],
        ),
    ],
)
def test_batches_are_padded_to_their_longest_row(tokenizer, task, rows, labels):
    collate = make_collator(tokenizer, task)
    batch = collate(list(encode(rows, tokenizer, task)))
    assert batch["input_ids"].tolist() == [[CLS, A, SEP, PAD], [CLS, A, A, SEP]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == labels
