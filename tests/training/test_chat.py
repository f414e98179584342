import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import SFTConfig, SFTTrainer

from rankflow.errors import RankFlowError, SpecError
from rankflow.training.chat import tokenize_spans
from rankflow.training.tokens import IGNORED, make_collator, tokenize

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")  # TRL's

TEMPLATES = {
    path.stem: path.read_text(encoding="utf-8")
    for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
USER = {"role": "user", "content": "What is good?"}
SYSTEM = {"role": "system", "content": "Be brief, s'il te plaît."}
FILM = {"role": "assistant", "content": "The film 🎬, naïvely\n\nand the play"}
WHY = {"role": "user", "content": "Why? \n"}
NOTHING = {"role": "assistant", "content": ""}
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"n": 1}}}],
}
RESULT = {"role": "tool", "content": "two films"}
CHATS = {
    "one turn": [USER, FILM],
    "a system": [SYSTEM, USER, FILM],
    "many turns": [SYSTEM, USER, FILM, WHY, {"role": "assistant", "content": "Paris"}],
    "an empty answer": [USER, FILM, WHY, NOTHING],
}
END = {
    "chatml": "<|im_end|>",
    "gemma": "</turn>",
    "llama": "<|turn|>",
    "mistral": "</s>",
    "zephyr": "</s>",
}


@pytest.fixture
def tokenizer(byte_level):
    return byte_level


@pytest.fixture(params=["byte_level", "spaces_as_letters"])
def any_tokenizer(request):
    return request.getfixturevalue(request.param)


def marked(template):
    """The same template with marks around what the model writes."""
    return template.replace("{#-begin-#}", "{%- generation -%}").replace(
        "{#-end-#}", "{%- endgeneration -%}"
    )


def encode(rows, tokenizer, *, max_length=200, loss_on="assistant"):
    splits = DatasetDict({"train": Dataset.from_list(rows)})
    return tokenize(splits, tokenizer, "causal-lm", max_length, loss_on)["train"]


def encode_chat(chat, tokenizer, template, **options):
    tokenizer.chat_template = template
    rows = encode([{"messages": chat}], tokenizer, **options)
    return rows["input_ids"][0], rows["labels"][0]


def learned_texts(ids, labels, tokenizer):
    """The stretches of tokens that have labels, as texts."""
    assert [label for label in labels if label != IGNORED] == [
        token for token, label in zip(ids, labels, strict=True) if label != IGNORED
    ]
    texts, run = [], []
    for label in [*labels, IGNORED]:
        if label != IGNORED:
            run.append(label)
        elif run:
            texts.append(tokenizer.decode(run))
            run = []
    return texts


def answers(chat, name):
    """What the assistant says, as the template writes it."""
    said = [message["content"] for message in chat if message["role"] == "assistant"]
    if name in ("llama", "gemma"):
        said = [text.strip() for text in said]
    space = " " if name == "mistral" else ""
    return [f"{space}{text}{END[name]}" for text in said]


@pytest.mark.parametrize("has_marks", [False, True], ids=["as it is", "with marks"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_exactly_the_assistants_words_and_their_end_are_learned(
    name, chat, has_marks, any_tokenizer
):
    chat = [m for m in CHATS[chat] if m is not SYSTEM or name != "gemma"]
    template = marked(TEMPLATES[name]) if has_marks else TEMPLATES[name]
    ids, labels = encode_chat(chat, any_tokenizer, template)
    assert learned_texts(ids, labels, any_tokenizer) == answers(chat, name)
    whole = any_tokenizer.apply_chat_template(chat, tokenize=False)
    assert ids == any_tokenizer(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_agree_with_the_mask_that_transformers_takes_from_marks(name, tokenizer):
    chat = [m for m in CHATS["many turns"] if m is not SYSTEM or name != "gemma"]
    ids, labels = encode_chat(chat, tokenizer, TEMPLATES[name])
    reference = tokenizer.apply_chat_template(
        chat,
        chat_template=marked(TEMPLATES[name]),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    assert reference["input_ids"] == ids
    assert reference["assistant_masks"] == [int(label != IGNORED) for label in labels]


@pytest.mark.parametrize("has_marks", [False, True], ids=["as it is", "with marks"])
def test_calls_of_tools_are_learned_and_their_results_are_not(has_marks, tokenizer):
    template = marked(TEMPLATES["chatml"]) if has_marks else TEMPLATES["chatml"]
    # Another call has other arguments; Arrow gives both calls the keys of the two.
    other = json.loads(json.dumps(CALL).replace('"n"', '"m"'))
    tokenizer.chat_template = template
    rows = encode([{"messages": [USER, call, RESULT, FILM]} for call in (CALL, other)], tokenizer)
    for row, letter in zip(rows, "nm", strict=True):
        assert learned_texts(row["input_ids"], row["labels"], tokenizer) == [
            f'<call>{{"name": "look", "arguments": {{"{letter}": 1}}}}</call><|im_end|>',
            FILM["content"] + "<|im_end|>",
        ]
        assert "two films<|im_end|>" in tokenizer.decode(row["input_ids"])


def train_by_trl(rows, tokenizer, tmp_path, **settings):
    """The rows that TRL makes of the same data."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", max_length=None, **settings
    )
    trainer = SFTTrainer(
        LlamaForCausalLM(config), arguments, train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    return trainer.train_dataset


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_are_labelled_as_by_trl(name, tokenizer, tmp_path):
    chats = [[m for m in chat if m is not SYSTEM or name != "gemma"] for chat in CHATS.values()]
    rows = [{"messages": chat} for chat in chats]
    tokenizer.chat_template = marked(TEMPLATES[name])
    reference = train_by_trl(rows, tokenizer, tmp_path, assistant_only_loss=True)
    tokenizer.chat_template = TEMPLATES[name]
    ours = encode(rows, tokenizer)
    assert ours["input_ids"][:] == reference["input_ids"][:]
    assert ours["labels"][:] == reference["labels"][:]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_and_answers_are_labelled_as_by_trl_up_to_white_space_behind_the_end(
    name, tokenizer, tmp_path
):
    tokenizer.chat_template = TEMPLATES[name]
    prompts = [[USER], [USER, FILM, WHY]]
    rows = [{"messages": prompt, "target": [NOTHING]} for prompt in prompts]
    rows += [{"messages": prompt, "target": [FILM]} for prompt in prompts]
    ours = encode(rows, tokenizer)
    renamed = [{"prompt": row["messages"], "completion": row["target"]} for row in rows]
    reference = train_by_trl(renamed, tokenizer, tmp_path, completion_only_loss=True)
    assert ours["input_ids"][:] == reference["input_ids"][:]
    for row, found, expected in zip(rows, ours["labels"], reference["labels"], strict=True):
        texts = [[t for t in labels if t != IGNORED] for labels in (found, expected)]
        assert texts[1][: len(texts[0])] == texts[0]
        assert tokenizer.decode(texts[1][len(texts[0]) :]).strip() == ""
        assert tokenizer.decode(texts[0]) == answers(row["target"], name)[0]


@pytest.mark.parametrize("has_marks", [False, True], ids=["as it is", "with marks"])
def test_with_a_target_earlier_answers_are_not_learned(has_marks, tokenizer):
    tokenizer.chat_template = marked(TEMPLATES["llama"]) if has_marks else TEMPLATES["llama"]
    target = [{"role": "assistant", "content": "Paris"}, WHY, {"role": "assistant", "content": "!"}]
    rows = [{"messages": [USER, FILM, WHY], "target": target}]
    row = encode(rows, tokenizer)[0]
    learned = learned_texts(row["input_ids"], row["labels"], tokenizer)
    assert learned == ["Paris<|turn|>", "!<|turn|>"]
    row = encode(rows, tokenizer, loss_on="all")[0]
    assert learned_texts(row["input_ids"], row["labels"], tokenizer) == [
        "Paris<|turn|><|header|>user<|/header|>\n\nWhy?<|turn|>"
        "<|header|>assistant<|/header|>\n\n!<|turn|>"
    ]


def test_all_of_a_conversation_is_learned_if_asked_for(tokenizer):
    ids, labels = encode_chat(CHATS["a system"], tokenizer, TEMPLATES["chatml"], loss_on="all")
    assert labels == ids


def test_white_space_is_learned_where_tokenizers_trim_it_from_offsets(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    chat = [USER, {"role": "assistant", "content": "  Paris  "}]
    ids, labels = encode_chat(chat, tokenizer, TEMPLATES["chatml"])
    assert learned_texts(ids, labels, tokenizer) == ["  Paris  <|im_end|>"]


def test_a_token_over_the_edge_of_an_answer_is_learned(tokenizer):
    ids, inside = tokenize_spans(tokenizer, "The film was", [(0, 2), (6, 8)])
    assert tokenizer.convert_ids_to_tokens(ids) == ["The", "Ġfilm", "Ġwas"]
    assert inside == [True, True, False]


def test_a_row_is_cut_behind_and_dropped_with_its_last_label(tokenizer):
    tokenizer.chat_template = TEMPLATES["llama"]
    rows = [{"messages": [USER, FILM]}, {"messages": [USER, FILM, WHY, FILM]}]
    whole = encode(rows, tokenizer)
    first = next(n for n, label in enumerate(whole["labels"][0]) if label != IGNORED)
    cut = encode(rows, tokenizer, max_length=first + 1)
    assert cut["input_ids"][:] == [row[: first + 1] for row in whole["input_ids"]]
    assert cut["labels"][:] == [row[: first + 1] for row in whole["labels"]]
    assert cut["attention_mask"][:] == [[1] * (first + 1)] * 2
    with pytest.raises(RankFlowError, match=rf"'train': every answer .*max_length = {first};"):
        encode(rows, tokenizer, max_length=first)
    long = {"role": "user", "content": "What is good? " * 9}
    kept = encode([*rows, {"messages": [long, FILM]}], tokenizer, max_length=first + 1)
    assert len(kept) == 2


def test_a_tokenizer_without_a_template_asks_for_one(tokenizer):
    tokenizer.chat_template = None
    with pytest.raises(SpecError, match=r"no chat template; name a file .*\[model\] chat_template"):
        encode([{"messages": [USER, FILM]}], tokenizer)


THINKING = """
{%- for m in messages -%}
{{ '<|im_start|>' + m.role + ' ' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif -%}
{{ m.content + '<|im_end|>' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant ' }}{% endif -%}
"""
CLOSING = """
{%- for m in messages %}{{ '<|header|>' + m.role + '\n' + m.content + '<|turn|>\n' }}{% endfor -%}
{{ '<|header|>assistant\n' if add_generation_prompt else eos_token }}
"""
REFUSED = {
    "rewrites": (THINKING, r"writes the first 2 messages in another way.*'<think>.*'The film"),
    "no end": (TEMPLATES["mistral"].replace("eos_token", "'.'"), "writes no special token at the"),
    "an end that is an ordinary word": (
        TEMPLATES["mistral"].replace("eos_token", "'</table>'"),
        "writes no special token at the end",
    ),
    "no end in its marks": (
        marked(TEMPLATES["chatml"].replace("{{- '<|im_end|>' }}\n        {#-end-#}", "{#-end-#}")),
        "generation %} blocks hold no special token at the end of a turn",
    ),
    "parts": ("{% for m in messages %}{{ m.role }}{% endfor %}</s>", "leaves out 'play', which"),
    "raises": ("{{ raise_exception('no films') }}", "it fails: no films"),
    "no template": ("{% for m in %}", "it fails: "),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_template_that_cannot_be_followed_is_refused_with_the_conversation(case, tokenizer):
    template, message = REFUSED[case]
    tokenizer.add_tokens(["</table>"])
    with pytest.raises(RankFlowError, match=f"begins 'What is good\\?': .*{message}"):
        encode_chat([USER, FILM, WHY, FILM], tokenizer, template)


def test_a_template_that_rewrites_earlier_turns_is_followed_for_the_last_one(tokenizer):
    tokenizer.chat_template = THINKING
    row = encode([{"messages": [USER, FILM, WHY], "target": [FILM]}], tokenizer)[0]
    assert learned_texts(row["input_ids"], row["labels"], tokenizer) == [
        f"<think></think>{FILM['content']}<|im_end|>"
    ]


def test_a_token_that_closes_the_whole_conversation_is_no_rewriting(tokenizer):
    ids, labels = encode_chat([USER, FILM, WHY, NOTHING], tokenizer, CLOSING.strip())
    assert learned_texts(ids, labels, tokenizer) == [
        f"{FILM['content']}<|turn|>",
        "<|turn|>\n</s>",
    ]


@pytest.mark.parametrize("kind", [GPT2LMHeadModel, LlamaForCausalLM])
def test_a_batch_has_the_loss_of_its_rows_whatever_side_the_tokenizer_pads(kind, tokenizer):
    tokenizer.padding_side = "left"
    sizes = {"vocab_size": len(tokenizer)}
    config = (
        GPT2Config(**sizes, n_embd=16, n_layer=2, n_head=2, n_positions=200)
        if kind is GPT2LMHeadModel
        else LlamaConfig(
            **sizes, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2,
        )
    )  # fmt: skip
    model = kind(config).eval()
    tokenizer.chat_template = TEMPLATES["chatml"]
    rows = encode([{"messages": chat} for chat in CHATS.values()], tokenizer)
    collate = make_collator(tokenizer, "causal-lm")

    def summed_loss(batch):
        count = (batch["labels"][:, 1:] != IGNORED).sum()
        with torch.no_grad():
            return model(**batch).loss.double() * count

    alone = sum(summed_loss(collate([row])) for row in rows)
    assert summed_loss(collate(list(rows))).item() == pytest.approx(alone.item(), rel=1e-5)
