"""Numbers of things in messages: "1 step", "2 steps"."""

from __future__ import annotations


def counted(number: int, one: str, many: str | None = None) -> str:
    """The number and its word: `one` for 1, else `many` (default: `one` with an s)."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
