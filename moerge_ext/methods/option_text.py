"""Options of a method as they are typed: "top_k=4", "alpha=all"."""

from __future__ import annotations

from typing import Any

ALL = "all"  # experts


def top_k(text: str) -> int | str:
    """What --top-k takes: a number or ALL."""
    return ALL if text.lower() in (ALL, "none") else int(text)


def parse_option(text: str) -> tuple[str, Any]:
    """ "name=value" with value an int, a float, true/false, none, or a string; top_k=all and keep=all are none."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--option takes NAME=VALUE, such as top_p=0.5, got {text!r}")
    words = {"true": True, "false": False, "none": None} | ({ALL: None} if name in ("top_k", "keep") else {})
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value
