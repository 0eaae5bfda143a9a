"""What a request may not say: refused by HTTP 400 before anything is computed, as transformers takes any number."""

from __future__ import annotations

import math
from typing import Any

from .context import refusal

COMPLETION = "CompletionHandler"  # transformers' class for /v1/completions


def hold_to_sense(handler: Any) -> None:
    """transformers' handler of an endpoint looks at our rules before its own."""
    theirs = getattr(handler, "_validate_request", None)
    if theirs is None or "_validate_request" in vars(handler):
        return

    def validate(body: dict[str, Any]) -> None:
        if problems := body_problems(body, completion=type(handler).__name__ == COMPLETION):
            raise refusal("; ".join(problems))
        theirs(body)

    handler._validate_request = validate


def body_problems(body: dict[str, Any], *, completion: bool) -> list[str]:
    """What is wrong with a request. completion: whether it is one of /v1/completions."""
    problems = []
    if completion and not isinstance(body.get("prompt"), str):
        got = f"got {body['prompt']!r:.100}" if "prompt" in body else "the request has none"
        chat = "; messages are for /v1/chat/completions" if "messages" in body else ""
        problems.append(f'"prompt" must be a text, {got}{chat}')
    for name, fine, expected in (
        ("temperature", lambda value: value >= 0, "a number from 0"),
        ("top_p", lambda value: 0 < value <= 1, "a number above 0 and at most 1"),
    ):
        value = body.get(name)
        if value is not None and not (_is_number(value) and fine(value)):
            problems.append(f'"{name}" must be {expected}, got {value!r:.100}')
    seed = body.get("seed")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int)):
        problems.append(f'"seed" must be an integer, got {seed!r:.100}')
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
