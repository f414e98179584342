"""Check conversations before anything is made of them."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from rankflow.errors import RankFlowError, excerpt
from rankflow.specs.run import LossOn
from rankflow.training.sources import Split

LEARNER: Final = "assistant"
"""The role whose turns the model learns."""

Message = dict[str, Any]


def check_messages(split: Split, columns: Mapping[str, str], loss_on: LossOn) -> None:
    """Refuse rows that are no conversations, or that hold nothing to learn.

    Args:
        split: Rows with a column ``messages``, and ``target`` if asked for.
        columns: What the source calls these columns, for messages of errors.
        loss_on: What of a row is to be learned.

    Raises:
        RankFlowError: It is so; the row is named.
    """
    last = "target" if "target" in columns else "messages"
    for role, column in columns.items():
        for row, value in enumerate(split.rows[role], start=1):
            where = f"{split.origin}: row {row}, column '{column}'"
            for fault in _faults(value):
                raise RankFlowError(f"{where}: {fault}")
            speakers = [message["role"] for message in value]
            if role == "target" and speakers[0] != LEARNER:
                raise RankFlowError(
                    f"{where}: it begins with a message of '{speakers[0]}'; a target begins with "
                    f"the answer of '{LEARNER}'"
                )
            if role == last and loss_on == LEARNER and LEARNER not in speakers:
                raise RankFlowError(
                    f"{where}: no message of '{LEARNER}', only of "
                    f"{', '.join(dict.fromkeys(speakers))}; rename the roles, remove such rows, or "
                    "set [data] loss_on = 'all'"
                )


def present(value: Any) -> Any:
    """Return a message without keys that have no value, at any depth.

    Arrow gives all messages of a column the same keys, those of a tool's arguments included.

    >>> present({"role": "user", "content": "x", "tool_calls": None})
    {'role': 'user', 'content': 'x'}
    """
    if isinstance(value, list):
        return [present(item) for item in value]
    if isinstance(value, dict):
        return {key: present(item) for key, item in value.items() if item is not None}
    return value


def _faults(value: object) -> Iterator[str]:
    if not isinstance(value, list) or not value or not all(isinstance(m, dict) for m in value):
        yield (
            f"a list of messages is needed and this is {excerpt(value)}; columns of strings go "
            "under [data] text and target"
        )
        return
    for number, message in enumerate(value, start=1):
        if not isinstance(message.get("role"), str):
            yield (
                f"message {number} has no role; a message has 'role' and 'content', and this one "
                f"{', '.join(map(repr, message))}: rename these"
            )
        has_calls = bool(message.get("tool_calls"))
        content = message.get("content")
        if not isinstance(content, str) and not (content is None and has_calls):
            yield (
                f"message {number} has the content {excerpt(content)}; it must be a string, which "
                "may be empty"
            )
