"""The forms in which a row says what a model is given and what it should answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
PAIRS = (
    '{"input": str, "target": str}, {"prompt": str, "completion": str} (or both a list of messages) or '
    '{"messages": [{"role": str, "content": str}, ...]}'
)
TEXTS = f'{PAIRS} or {{"text": str}}'


class Example(dict):
    """A row with all its fields, and "input" and "target" whatever its form was; of a text only "text".

    conversation: the messages before the answer, None for a row without messages.
    """

    conversation: list[dict[str, str]] | None = None


def as_example(row: Any, *, text: bool = False) -> Example:
    """The row as an `Example`; ValueError with what was expected.

    {"input", "target"}, TRL's {"prompt", "completion"}, as texts or as messages, and TRL's {"messages"}, whose last
    message is the target; its input is what the user said last. With `text` also {"text"}.
    """
    if isinstance(row, Example):
        return row
    expected = f"expected {TEXTS if text else PAIRS}"
    if not isinstance(row, Mapping):
        raise ValueError(f"{expected}, got {type(row).__name__}")
    for first, second in (("input", "target"), ("prompt", "completion")):
        if isinstance(row.get(first), str) and isinstance(row.get(second), str):
            return Example({**row, "input": row[first], "target": row[second]})
    if isinstance(row.get("prompt"), list) and isinstance(row.get("completion"), list):
        return _conversation(row, [*row["prompt"], *row["completion"]], answers=len(row["completion"]))
    if isinstance(row.get("messages"), list):
        return _conversation(row, row["messages"])
    if text and isinstance(row.get("text"), str):
        return Example(row)
    raise ValueError(f"{expected}, got keys {sorted(map(str, row))}")


def _conversation(row: Mapping[str, Any], messages: list[Any], *, answers: int = 1) -> Example:
    """A row of messages, the last `answers` of which are to be learned."""
    for number, message in enumerate(messages):
        fine = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not fine or message.get("role") not in ROLES:
            raise ValueError(
                f'message {number} must be {{"role": one of {", ".join(ROLES)}, "content": str}}, got {message!r:.200}'
            )
    if answers != 1:
        raise ValueError(f"the completion must be one message of the assistant, got {answers} messages")
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["assistant"]:
        raise ValueError(f"the last message must be the assistant's, which is the answer; the roles are {roles}")
    if "user" not in roles:
        raise ValueError(f"the messages before the answer must hold one of the user; the roles are {roles}")
    *given, answer = messages
    asked = next(message["content"] for message in reversed(given) if message["role"] == "user")
    example = Example({**row, "input": asked, "target": answer["content"]})
    example.conversation = [dict(message) for message in given]
    return example
