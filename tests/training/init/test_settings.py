import pytest

from rankflow.errors import SpecError
from rankflow.training.init.checkpoint import read_checkpoint
from rankflow.training.init.choose import choose_reading
from rankflow.training.init.rows import describe
from rankflow.training.init.settings import choose_length, choose_settings, measure_rows

CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "The film."}]


def lengths_of(folder, data, **asked):
    columns = [describe(name, values) for name, values in data.items()]
    model = read_checkpoint(folder, None)
    reading = choose_reading(columns, model.family, None, asked)
    return measure_rows(reading, model), model


def test_rows_are_measured_as_they_will_be_trained(
    bert_folder, llama_folder, bart_folder, chat_folder
):
    texts, labels = ["a film", "a good film"] * 4, [0, 1] * 4
    lengths, _ = lengths_of(bert_folder, {"text": texts, "label": labels})
    assert lengths[:2] == [4, 5]
    pair = {"text": texts, "other": texts, "label": labels}
    lengths, _ = lengths_of(bert_folder, pair, text="text", text_pair="other")
    assert lengths[:2] == [8, 10]
    words = {"words": [["a", "films"], ["a"]], "tags": [[0, 1], [0]]}
    assert lengths_of(bert_folder, words)[0] == [5, 3]
    pair = {"prompt": ["a film"], "completion": ["good"]}
    assert lengths_of(llama_folder, pair)[0] == [7]
    pair = {"document": ["a good film"], "summary": ["good"]}
    assert lengths_of(bart_folder, pair)[0] == [5]
    lengths, model = lengths_of(chat_folder, {"messages": [CHAT]})
    ids = model.tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert lengths == [len(ids)]
    split = {"prompt": [CHAT[:1]], "completion": [CHAT[1:]]}
    assert lengths_of(chat_folder, split)[0] == [len(ids)]


def test_conversations_need_a_template(llama_folder):
    with pytest.raises(SpecError, match="has no chat template; name a file"):
        lengths_of(llama_folder, {"messages": [CHAT]})


@pytest.mark.parametrize(
    ("lengths", "positions", "share", "expected"),
    [
        ([3], None, 0.99, 16),
        ([17], None, 0.99, 32),
        ([17], 20, 0.99, 20),
        ([10] * 99 + [900], None, 0.99, 16),
        ([10] * 98 + [900] * 2, None, 0.99, 1024),
        ([10] * 99 + [900], None, 1.0, 1024),
        ([100_000], None, 0.99, 4096),
    ],
)
def test_the_length_covers_nearly_all_rows_but_no_more_than_the_model_reads(
    lengths, positions, share, expected
):
    assert choose_length(lengths, positions, share) == expected


@pytest.mark.parametrize(
    ("parameters", "stored", "length", "expected"),
    [
        (22_000_000, None, 30, ("float32", 16, 1, 2e-3)),
        (22_000_000, None, 1000, ("float32", 8, 2, 2e-3)),
        (500_000_000, "bfloat16", 1000, ("bfloat16", 4, 4, 1e-3)),
        (1_000_000_000, "float32", 100, ("bfloat16", 16, 1, 2e-4)),
        (8_000_000_000, "float16", 1000, ("bfloat16", 2, 8, 2e-4)),
        (70_000_000_000, "bfloat16", 4000, ("bfloat16", 1, 16, 1e-4)),
        (None, None, 1000, ("bfloat16", 2, 8, 2e-4)),
    ],
)
def test_larger_models_get_smaller_batches_and_rates(parameters, stored, length, expected, model):
    found = choose_settings(model(parameters, stored), "causal-lm", [length], whole=False)
    batch = (found.dtype, found.batch, found.accumulation, found.learning_rate)
    assert batch == expected
    assert found.batch * found.accumulation == 16


@pytest.fixture
def model(llama_folder):
    from dataclasses import replace

    read = read_checkpoint(llama_folder, None)
    return lambda parameters, stored: replace(
        read, parameters=parameters, dtype=stored, positions=None
    )
