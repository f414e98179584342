import pytest
from datasets import Dataset

from rankflow.errors import RankFlowError
from rankflow.specs.run import DataSpec
from rankflow.training.data import load_data

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


@pytest.fixture
def load(write_rows):
    """Load rows with messages, all of them for training."""

    def read(rows, **keys):
        path = str(write_rows("chat.jsonl", rows))
        spec = DataSpec(train=path, messages="messages", validation_fraction=0, **keys)
        return load_data(spec, "causal-lm").splits["train"]

    return read


def test_conversations_come_out_under_one_name_whatever_their_source_calls_them(write_rows):
    rows = [{"chat": [USER], "reply": [ANSWER], "id": n} for n in range(2)]
    spec = DataSpec(
        train=str(write_rows("chat.jsonl", rows)),
        messages="chat",
        target="reply",
        validation_fraction=0,
    )
    assert (
        load_data(spec, "causal-lm").splits["train"].to_list()
        == [{"messages": [USER], "target": [ANSWER]}] * 2
    )


def test_parquet_holds_conversations_too(tmp_path):
    path = tmp_path / "chat.parquet"
    Dataset.from_list([{"messages": [USER, ANSWER]}] * 2).to_parquet(str(path))
    spec = DataSpec(train=str(path), messages="messages", validation_fraction=0)
    assert load_data(spec, "causal-lm").splits["train"]["messages"][:] == [[USER, ANSWER]] * 2


FAULTS = {
    "a string": ("hi", r"a list of messages is needed and this is 'hi'; columns of strings go"),
    "nothing": ([], r"a list of messages is needed and this is \[\]"),
    "strings": (["hi", "hello"], r"a list of messages is needed and this is \['hi', 'hello'\]"),
    "other keys": (
        [{"from": "human", "value": "hi"}],
        r"message 1 has no role; .* this one 'from', 'value': rename these",
    ),
    "parts": (
        [USER, {"role": "assistant", "content": [{"type": "text", "text": "hello"}]}],
        r"message 2 has the content \[\{'type': 'text'.*; it must be a string",
    ),
    "no content": ([USER, {"role": "assistant"}], r"message 2 has the content None"),
    "other roles": (
        [USER, {"role": "bot", "content": "hello"}],
        r"no message of 'assistant', only of user, bot; rename the roles",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_what_is_no_conversation_is_refused_with_its_row(case, load):
    value, message = FAULTS[case]
    with pytest.raises(RankFlowError, match=rf"chat\.jsonl: row 1, column 'messages': {message}"):
        load([{"messages": value}] * 2)


def test_the_row_at_fault_is_named(load):
    with pytest.raises(RankFlowError, match=r"row 3, column 'messages': no message of 'assistant'"):
        load([{"messages": [USER, ANSWER]}, {"messages": [ANSWER]}, {"messages": [USER]}])


def test_a_call_of_a_tool_needs_no_content(load):
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert len(load([{"messages": [USER, call]}] * 2)) == 2


def test_without_an_assistant_all_can_still_be_learned(load):
    assert len(load([{"messages": [USER]}] * 2, loss_on="all")) == 2


def test_a_target_must_be_an_answer(load):
    rows = [{"messages": [USER], "target": "hello"}] * 2
    with pytest.raises(RankFlowError, match=r"column 'target': a list of messages is needed"):
        load(rows, target="target")
    rows = [{"messages": [USER], "target": [USER, ANSWER]}] * 2
    with pytest.raises(RankFlowError, match=r"begins with a message of 'user'; a target begins"):
        load(rows, target="target")


def test_conversations_under_text_are_pointed_to_messages(write_rows):
    path = str(write_rows("chat.jsonl", [{"messages": [USER, ANSWER]}] * 2))
    with pytest.raises(RankFlowError, match=r"lists of messages go under \[data\] messages"):
        load_data(DataSpec(train=path, text="messages"), "causal-lm")
