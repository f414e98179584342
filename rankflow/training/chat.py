"""Write a conversation as its model's chat template does, and tell what of it is learned.

Only the template knows what it writes around a message. Where it marks what the model generates
(``{% generation %}``), these marks say what is learned. Where it does not, a turn of the assistant
is what rendering adds to the conversation before it and the generation prompt: what the model sees
and what it writes at inference. That holds for templates that only ever append, and so it is
checked for every turn.

A turn is learned with the token that ends it, for a model that never sees it cannot learn to stop.
White space behind that token is not: by then generation has stopped.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, Final

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rankflow.errors import RankFlowError, SpecError, brief, excerpt
from rankflow.specs.run import LossOn
from rankflow.training.messages import LEARNER, Message

Span = tuple[int, int]
"""Where a stretch of text begins and ends (characters)."""

_MARK: Final = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not know how a conversation is written.

    Raises:
        SpecError: It is so.
    """
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise SpecError(
            f"[data] messages: the tokenizer of '{tokenizer.name_or_path}' has no chat template; "
            "name a file with one under [model] chat_template, or a model that was made to chat"
        ) from error


class Conversation:
    """Messages under a tokenizer's chat template.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: All messages.

    Attributes:
        text: The whole conversation as the template writes it.

    Raises:
        RankFlowError: The template fails, or leaves out what the assistant says.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> None:
        self._template: str = tokenizer.get_chat_template()
        self._names: Mapping[str, Any] = tokenizer.special_tokens_map
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        self._ends = tuple(special.union(tokenizer.all_special_tokens))
        self._messages = messages
        self._has_marks = _MARK.search(self._template) is not None
        self.text, self._marks = self._render(len(messages), prompt=False)
        self._check_content()

    def learned_spans(self, first: int, loss_on: LossOn) -> list[Span]:
        """Return what is learned of the text, in order.

        Args:
            first: Number of messages that are a prompt.
            loss_on: What of the messages behind is learned: the assistant's turns, or all.

        Raises:
            RankFlowError: The template fails, rewrites what it wrote before, or ends no turn.
        """
        if loss_on == "all":
            return [(self._prompt(first) if first else 0, len(self.text))]
        turns = self._marked_turns(first) if self._has_marks else self._added_turns(first)
        spans = [self._close(start, end) for start, end in turns]
        # A template may mark parts of a turn apart, so that only the last part can be judged.
        judged = spans[-1:] if self._has_marks else spans
        if not spans or not all(self.text[slice(*span)].endswith(self._ends) for span in judged):
            where = "its {% generation %} blocks hold" if self._has_marks else "it writes"
            raise self._error(
                f"{where} no special token at the end of a turn of the assistant, so that the "
                "model would not learn to stop; let the template write one there, such as "
                "{{ eos_token }}"
            )
        return spans

    def _check_content(self) -> None:
        """Templates of models that see images take content in parts, and drop strings silently.

        Some drop what the assistant thought, but none its last word.
        """
        for message in self._messages:
            words = (message.get("content") or "").split()
            if message["role"] == LEARNER and words and words[-1] not in self.text:
                raise self._error(
                    f"it leaves out {words[-1]!r}, which the assistant says; name a template for "
                    "texts under [model] chat_template"
                )

    def _marked_turns(self, first: int) -> list[Span]:
        begin = self._through(first) if first else 0
        return [(start, end) for start, end in self._marks if start >= begin]

    def _added_turns(self, first: int) -> list[Span]:
        turns = [n for n, message in enumerate(self._messages) if message["role"] == LEARNER]
        return [(self._prompt(n), self._through(n + 1)) for n in turns if n >= first]

    def _prompt(self, count: int) -> int:
        """Return how long the first messages are with the generation prompt."""
        return self._length(count, self._render(count, prompt=True)[0])

    def _through(self, count: int) -> int:
        """Return how long the first messages are."""
        if count == len(self._messages):
            return len(self.text)
        written = self._render(count, prompt=False)[0]
        # Some templates close a whole conversation by one more token than a turn.
        closing = next((end for end in self._ends if written.endswith(end)), "")
        return self._length(count, written, written.removesuffix(closing))

    def _length(self, count: int, *prefixes: str) -> int:
        for prefix in prefixes:
            if self.text.startswith(prefix):
                return len(prefix)
        same = _shared(prefixes[0], self.text)
        raise self._error(
            f"it writes the first {count} messages in another way when others follow: "
            f"{prefixes[0][same : same + 30]!r}, and then {self.text[same : same + 30]!r}; name a "
            "template under [model] chat_template that appends only, or that has {% generation %} "
            "and {% endgeneration %} around what the model writes"
        )

    def _close(self, start: int, end: int) -> Span:
        """Leave out the white space that a template writes behind the end of a turn."""
        bare = self.text[start:end].rstrip()
        return (start, start + len(bare)) if bare.endswith(self._ends) else (start, end)

    def _render(self, count: int, *, prompt: bool) -> tuple[str, list[Span]]:
        """Write the first messages, and tell what of them the template marks."""
        try:
            texts, marks = render_jinja_template(
                conversations=[self._messages[:count]],
                chat_template=self._template,
                add_generation_prompt=prompt,
                return_assistant_tokens_mask=self._has_marks,
                **self._names,
            )
        except Exception as error:  # a template raises what its filters raise
            raise self._error(
                f"it fails: {brief(error)}; mend it, or name another under [model] chat_template"
            ) from error
        return texts[0], marks[0] if marks else []

    def _error(self, what: str) -> RankFlowError:
        begin = excerpt(self._messages[0].get("content"))
        return RankFlowError(f"the chat template, on the conversation that begins {begin}: {what}")


def tokenize_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Sequence[Span]
) -> tuple[list[int], list[bool]]:
    """Tokenise a text, and tell which tokens belong to some stretches of it.

    A stretch begins behind the tokens that the text before it has by itself, as at inference. A
    token that reaches over an edge of it belongs to it.

    Args:
        tokenizer: Its special tokens are in the text, and none is added.
        text: The whole text.
        spans: Stretches of it, in order.

    Returns:
        Token ids, and whether each is in a stretch, both of shape ``(tokens,)``.
    """
    texts = [text, *(text[:edge] for span in spans for edge in span)]
    encoded = tokenizer(texts, add_special_tokens=False, truncation=False, verbose=False)
    ids, *prefixes = encoded["input_ids"]
    inside = [False] * len(ids)
    for before, through in zip(prefixes[::2], prefixes[1::2], strict=True):
        start, end = _shared(before, ids), _shared(through, ids)
        end += end < len(through)
        inside[start:end] = [True] * (end - start)
    return ids, inside


def _shared(prefix: Sequence[Any], whole: Sequence[Any]) -> int:
    """Return how many items two sequences have in common from their beginning on."""
    if whole[: len(prefix)] == prefix:
        return len(prefix)
    pairs = zip(prefix, whole, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
