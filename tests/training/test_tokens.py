import pytest
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, processors
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


@pytest.fixture
def answering(llama_tokenizer):
    """A tokenizer that begins a text, as Llama's does, and leaves the end to us."""
    llama_tokenizer.bos_token = "[CLS]"
    llama_tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", CLS)]
    )
    return llama_tokenizer


def answer_row(tokenizer, text, target, max_length=16):
    rows = encode([{"text": text, "target": target}], tokenizer, "causal-lm", max_length)
    assert len(rows) == 1
    assert rows["attention_mask"][0] == [1] * len(rows["input_ids"][0])
    return rows["input_ids"][0], rows["labels"][0]


def test_only_the_answer_and_its_end_are_learned(answering):
    ids, labels = answer_row(answering, "a film", "good bad")
    assert ids == [CLS, A, FILM, GOOD, BAD, SEP]
    assert labels == [IGNORED, IGNORED, IGNORED, GOOD, BAD, SEP]


def test_a_prompt_that_is_too_long_loses_its_left_and_keeps_its_beginning(answering):
    ids, labels = answer_row(answering, "bad " * 20 + "a film", "good", max_length=5)
    assert ids == [CLS, A, FILM, GOOD, SEP]
    assert labels == [IGNORED, IGNORED, IGNORED, GOOD, SEP]
    ids, _ = answer_row(answering, "a film", "good", max_length=3)
    assert ids == [CLS, GOOD, SEP]


def test_a_prompt_without_a_token_that_begins_it_is_cut_from_its_very_left(answering):
    answering.bos_token = None
    answering.backend_tokenizer.post_processor = None
    assert answer_row(answering, "bad a film", "good", max_length=4)[0] == [A, FILM, GOOD, SEP]


def test_an_answer_that_fits_exactly_is_whole_and_a_longer_one_is_refused(answering):
    assert answer_row(answering, "a film", "good bad", max_length=4)[0] == [CLS, GOOD, BAD, SEP]
    with pytest.raises(RankFlowError, match=r"'good bad a' has 4 tokens.* leaves room for 3 "):
        answer_row(answering, "a film", "good bad a", max_length=4)


def test_there_is_one_end_whatever_the_tokenizer_and_the_texts_write(llama_tokenizer):
    ids, labels = answer_row(llama_tokenizer, "a", "good [SEP]")  # writes [CLS] a [SEP]
    assert ids == [CLS, A, GOOD, SEP]
    assert labels == [IGNORED, IGNORED, GOOD, SEP]


def test_without_an_end_token_the_answer_is_all_there_is_to_learn(answering):
    answering.eos_token = None
    assert answer_row(answering, "a", "good")[1] == [IGNORED, IGNORED, GOOD]
    with pytest.raises(RankFlowError, match="the target '' has no token to learn"):
        answer_row(answering, "a", "")


def test_an_answer_to_nothing_is_refused_where_no_token_begins_a_text(answering):
    assert answer_row(answering, "", "good")[0] == [CLS, GOOD, SEP]
    answering.backend_tokenizer.post_processor = None
    with pytest.raises(RankFlowError, match="the target 'good' has an empty prompt"):
        answer_row(answering, "", "good")


def test_padding_is_no_part_of_an_answer(answering):
    rows = encode(
        [{"text": "a", "target": "good"}, {"text": "a film a", "target": "bad"}],
        answering,
        "causal-lm",
    )
    batch = make_collator(answering, "causal-lm")(list(rows))
    assert batch["input_ids"].tolist() == [
        [CLS, A, GOOD, SEP, PAD, PAD],
        [CLS, A, FILM, A, BAD, SEP],
    ]
    assert batch["labels"].tolist() == [
        [IGNORED, IGNORED, GOOD, SEP, IGNORED, IGNORED],
        [IGNORED] * 4 + [BAD, SEP],
    ]


def test_targets_of_pairs_are_labels(tokenizer):
    rows = encode([{"text": "good", "target": "a film"}], tokenizer, "seq2seq-lm")
    assert rows["input_ids"][:] == [[CLS, GOOD, SEP]]
    assert rows["labels"][:] == [[CLS, A, FILM, SEP]]


def test_a_tokenizer_cuts_no_texts_once_it_is_saved(tokenizer, tmp_path):
    encode([{"text": "good " * 40, "label": 0}], tokenizer, "sequence-classification", 5)
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert len(saved.encode("good " * 40).ids) == 42


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
