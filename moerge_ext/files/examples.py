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
QUESTIONS = ("input", "prompt", "question", "query", "problem", "instruction")  # keys, the likeliest of a row first
ANSWERS = ("target", "completion", "answer", "output", "response", "solution", "label")
ASKED = (
    '{"input": str}, {"prompt": str}, {"prompt": list of messages} or '
    '{"messages": [{"role": str, "content": str}, ...]}'
)


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
    raise ValueError(f"{expected}, got {_came(row)}{_renaming(row)}")


def _renaming(row: Mapping[str, Any], *, answered: bool = True) -> str:
    """How rows get the names "input" and "target"; nothing where it is not plain what is the question or the answer."""
    asked, answers = ([key for key in keys if isinstance(row.get(key), str)] for keys in (QUESTIONS, ANSWERS))
    if not asked or (len(asked) > 1 and asked != ["input", "instruction"]) or (answered and len(answers) != 1):
        return ""
    named = {"input": asked[0]} | ({"target": answers[0]} if answered else {})
    pair = " | ".join(f".{new} = .{old}" for new, old in named.items() if new != old)
    more = "; --template '{instruction}\\n\\n{input}' puts both" if len(asked) > 1 else ""
    return f"; `jq -c '{pair}' FILE` makes such rows{more}"


def _came(row: Mapping[str, Any]) -> str:
    """The keys of a row, and which of those that were looked for hold something else than a text."""
    asked = ("input", "target", "prompt", "completion", "messages", "text")
    wrong = [f"{key} is {type(row[key]).__name__}" for key in asked if key in row and not isinstance(row[key], str)]
    return f"keys {sorted(map(str, row))}" + (f", of which {', '.join(wrong)}" if wrong else "")


def as_prompt(row: Any) -> Example:
    """A row that is to be answered, as an `Example` with "input"; it may have a target, as in `as_example`.

    ValueError with what was expected.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"expected {ASKED}, got {type(row).__name__}")
    for name in ("input", "prompt"):
        if isinstance(row.get(name), str):
            return Example({**row, "input": row[name]})
    messages = next((row[name] for name in ("prompt", "messages") if isinstance(row.get(name), list)), None)
    if messages is None:
        raise ValueError(f"expected {ASKED}, got {_came(row)}{_renaming(row, answered=False)}")
    _check_messages(messages)
    given = messages[:-1] if messages and messages[-1]["role"] == "assistant" and "messages" in row else messages
    if not given or given[-1]["role"] == "assistant":
        raise ValueError("the last message before the answer must not be the assistant's")
    return _asked(row, given)


def _check_messages(messages: list[Any]) -> None:
    for number, message in enumerate(messages):
        fine = isinstance(message, Mapping) and isinstance(message.get("content"), str)
        if not fine or message.get("role") not in ROLES:
            raise ValueError(
                f'message {number} must be {{"role": one of {", ".join(ROLES)}, "content": str}}, got {message!r:.200}'
            )


def _conversation(row: Mapping[str, Any], messages: list[Any], *, answers: int = 1) -> Example:
    """A row of messages, the last `answers` of which are to be learned."""
    _check_messages(messages)
    if answers != 1:
        raise ValueError(f"the completion must be one message of the assistant, got {answers} messages")
    roles = [message["role"] for message in messages]
    if roles[-1:] != ["assistant"]:
        raise ValueError(f"the last message must be the assistant's, which is the answer; the roles are {roles}")
    *given, answer = messages
    example = _asked(row, given)
    example["target"] = answer["content"]
    return example


def _asked(row: Mapping[str, Any], given: list[Any]) -> Example:
    """The row of a conversation that is to be answered."""
    if "user" not in (roles := [message["role"] for message in given]):
        raise ValueError(f"the messages before the answer must hold one of the user; the roles are {roles}")
    asked = next(message["content"] for message in reversed(given) if message["role"] == "user")
    example = Example({**row, "input": asked})
    example.conversation = [dict(message) for message in given]
    return example
