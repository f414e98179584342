"""Turn the rows of a run into token ids, and the ids into padded batches."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from datasets import DatasetDict
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
)

from rankflow.errors import RankFlowError, SpecError
from rankflow.specs.run import LossOn, Task
from rankflow.training.chat import Conversation, check_template, tokenize_spans
from rankflow.training.messages import present

IGNORED = -100
Columns = Mapping[str, list[Any]]
Collator = Callable[[list[dict[str, Any]]], Mapping[str, Any]]


def tokenize(
    splits: DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    max_length: int,
    loss_on: LossOn = "assistant",
) -> DatasetDict:
    """Replace texts by token ids of at most ``max_length`` tokens; longer texts are cut.

    For ``causal-lm`` nothing is lost: a long text becomes several rows. With targets a row is the
    prompt, the target and the end token, only the last two of which have labels. What does not fit
    is cut from the left of the prompt, behind its beginning-of-text token. Prompt and target are
    tokenised apart, as they are at inference, with nothing put between them: a space or a line
    break between the two belongs into one of them.

    Conversations are one row each, cut behind ``max_length``; a row is dropped if nothing that is
    learned is left of it. See `rankflow.training.chat` for what is learned.

    Args:
        splits: Rows with the columns that `rankflow.training.data` describes.
        tokenizer: The model's tokenizer.
        task: What the model learns.
        max_length: Longest row (tokens).
        loss_on: What of a conversation is learned.

    Returns:
        Splits with ``input_ids``, ``attention_mask`` and ``labels``.

    Raises:
        SpecError: There are conversations and no template for them, or ``max_length`` leaves no
            room for a text.
        RankFlowError: A split has no row left, a target does not fit or has no prompt, the chat
            template cannot be followed, or the tokenizer cannot align words.
    """
    if task == "token-classification" and not tokenizer.is_fast:
        raise RankFlowError(
            f"{type(tokenizer).__name__} cannot tell which word a token belongs to, which "
            "task = 'token-classification' needs; choose a model with a fast tokenizer"
        )
    _check_room(tokenizer, task, max_length)
    encode = partial(_ENCODERS[task], tokenizer=tokenizer, max_length=max_length)
    if "messages" in splits["train"].column_names:
        check_template(tokenizer)
        encode = partial(
            _encode_conversations, tokenizer=tokenizer, max_length=max_length, loss_on=loss_on
        )
    tokenized = splits.map(encode, batched=True, remove_columns=splits["train"].column_names)
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # it would be saved, and cut other texts
    for name, rows in tokenized.items():
        if len(rows) == 0:
            what = "no text has the two tokens that a prediction needs"
            if "messages" in splits[name].column_names:
                what = f"every answer begins behind [data] max_length = {max_length}; raise it"
            raise RankFlowError(f"split '{name}': {what}")
    return tokenized


def make_collator(tokenizer: PreTrainedTokenizerBase, task: Task) -> Collator:
    """Return the function that pads rows to the longest of their batch."""
    collator: Collator
    if task == "sequence-classification":
        collator = DataCollatorWithPadding(tokenizer)
    elif task == "token-classification":
        collator = DataCollatorForTokenClassification(tokenizer, label_pad_token_id=IGNORED)
    elif task == "causal-lm":
        collator = CausalCollator(tokenizer)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return collator


@dataclass(frozen=True, slots=True)
class CausalCollator:
    """Pads the rows of a causal model on the right, whatever side its tokenizer pads.

    Tokenizers of decoders often pad on the left, for generation. In training a model counts
    positions from the first column on, so that padding there would move the text.

    Attributes:
        tokenizer: Knows the padding token; the Trainer saves it with its checkpoints.
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return ``input_ids``, ``attention_mask`` and ``labels``, each ``(rows, tokens)``."""
        padding = {
            "input_ids": self.tokenizer.pad_token_id,
            "attention_mask": 0,
            "labels": IGNORED,
        }
        width = max(len(row["input_ids"]) for row in rows)
        return {
            key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
            for key, value in padding.items()
        }


def align_labels(word_ids: list[int | None], labels: list[int]) -> list[int]:
    """Give each word's label to its first token; other tokens are ignored by the loss.

    >>> align_labels([None, 0, 0, 1, None], [7, 9])
    [-100, 7, -100, 9, -100]
    """
    previous = [None, *word_ids[:-1]]
    return [
        IGNORED if word is None or word == before else labels[word]
        for word, before in zip(word_ids, previous, strict=True)
    ]


def chunk(ids: list[int], length: int) -> list[list[int]]:
    """Cut a row into pieces of at most ``length`` tokens; a last piece of one token is dropped.

    >>> chunk([1, 2, 3, 4, 5], 2)
    [[1, 2], [3, 4]]
    """
    pieces = [ids[start : start + length] for start in range(0, len(ids), length)]
    return [piece for piece in pieces if len(piece) > 1]


def join_answer(prompt: list[int], answer: list[int], length: int, *, kept: int) -> list[int]:
    """Put an answer behind as much of its prompt as fits.

    The prompt loses tokens behind its first ``kept``, from the left. At least one token of it must
    stay, since a causal model cannot predict the first token of a row.

    Args:
        prompt: At least one token.
        answer: Fewer than ``length`` tokens, and at most as many as leave room for ``kept``.
        length: Longest row (tokens).
        kept: Tokens at the prompt's start that stay.

    >>> join_answer([1, 5, 6, 7], [8, 9], 4, kept=1), join_answer([1, 5], [8, 9], 4, kept=1)
    ([1, 7, 8, 9], [1, 5, 8, 9])
    """
    cut = max(0, len(prompt) + len(answer) - length)
    return prompt[:kept] + prompt[kept + cut :] + answer


def _encode_text(rows: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Columns:
    encoded = tokenizer(rows["text"], rows.get("text_pair"), truncation=True, max_length=max_length)
    return {**encoded, "labels": rows["label"]}


def _encode_words(rows: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Columns:
    encoded = tokenizer(
        rows["text"], is_split_into_words=True, truncation=True, max_length=max_length
    )
    labels = [
        align_labels(encoded.word_ids(row), labels) for row, labels in enumerate(rows["label"])
    ]
    return {**encoded, "labels": labels}


def _encode_causal(rows: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Columns:
    if "target" in rows:
        return _encode_answers(rows, tokenizer, max_length)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    pieces = [
        piece
        for ids in tokenizer(rows["text"], truncation=False, verbose=False)["input_ids"]
        for piece in chunk(ids if ids[-1:] == end else ids + end, max_length)
    ]
    return {
        "input_ids": pieces,
        "attention_mask": [[1] * len(piece) for piece in pieces],
        "labels": pieces,
    }


def _encode_answers(rows: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Columns:
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    tail = [] if end is None else [end]
    prompts = tokenizer(rows["text"], truncation=False, verbose=False)["input_ids"]
    answers = tokenizer(rows["target"], add_special_tokens=False, truncation=False, verbose=False)
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for ended_prompt, bare_answer, target in zip(
        prompts, answers["input_ids"], rows["target"], strict=True
    ):
        prompt = _without_end(ended_prompt, end)
        answer = _without_end(bare_answer, end) + tail
        _check_answer(prompt, answer, target, max_length)
        ids = join_answer(prompt, answer, max_length, kept=int(prompt[0] == start))
        encoded["input_ids"].append(ids)
        encoded["attention_mask"].append([1] * len(ids))
        encoded["labels"].append([IGNORED] * (len(ids) - len(answer)) + answer)
    return encoded


def _encode_conversations(
    rows: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: LossOn
) -> Columns:
    encoded: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    targets = rows.get("target") or [[]] * len(rows["messages"])
    for messages, target in zip(rows["messages"], targets, strict=True):
        chat = Conversation(tokenizer, present([*messages, *target]))
        spans = chat.learned_spans(len(messages) if target else 0, loss_on)
        all_ids, learned = tokenize_spans(tokenizer, chat.text, spans)
        ids = all_ids[:max_length]
        if any(learned[1 : len(ids)]):  # nothing predicts the first token
            labels = [i if yes else IGNORED for i, yes in zip(ids, learned, strict=False)]
            encoded["input_ids"].append(ids)
            encoded["attention_mask"].append([1] * len(ids))
            encoded["labels"].append(labels)
    return encoded


def _check_room(tokenizer: PreTrainedTokenizerBase, task: Task, max_length: int) -> None:
    """Refuse a length that cuts every text down to nothing that could be learned from."""
    least = 2 if task == "causal-lm" else tokenizer.num_special_tokens_to_add() + 1
    if max_length < least:
        raise SpecError(
            f"[data] max_length = {max_length}: no text fits beside the tokens that the tokenizer "
            f"puts around it; set it to {least} or more"
        )


def _without_end(ids: list[int], end: int | None) -> list[int]:
    return ids[:-1] if ids and ids[-1] == end else ids


def _check_answer(prompt: list[int], answer: list[int], target: str, max_length: int) -> None:
    shown = repr(target if len(target) <= 40 else f"{target[:40]}...")
    if not answer:
        raise RankFlowError(f"the target {shown} has no token to learn; remove such rows")
    if not prompt:
        raise RankFlowError(
            f"the target {shown} has an empty prompt, and this tokenizer begins no text by a token "
            "of its own; remove such rows"
        )
    if len(answer) >= max_length:
        raise RankFlowError(
            f"the target {shown} has {len(answer)} tokens, its end included, and [data] max_length "
            f"= {max_length} leaves room for {max_length - 1} behind a prompt; raise it, or remove "
            "such rows: a target is never cut"
        )


def _encode_pair(rows: Columns, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Columns:
    encoded = tokenizer(rows["text"], truncation=True, max_length=max_length)
    targets = tokenizer(text_target=rows["target"], truncation=True, max_length=max_length)
    return {**encoded, "labels": targets["input_ids"]}


_ENCODERS: Mapping[Task, Callable[..., Columns]] = {
    "sequence-classification": _encode_text,
    "token-classification": _encode_words,
    "causal-lm": _encode_causal,
    "seq2seq-lm": _encode_pair,
}
