"""The text of each token of a sequence, so that all of them together are the text."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_HALF = "\ufffd"  # what decoders write for bytes that are no whole character
_LONGEST = 4  # bytes of a character in UTF-8
_BREAKS = ("\u2028", "\u2029")
_DIRECTIONS = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True)
class Piece:
    """Tokens `start` to `stop` and their text: one token, or the few that are one character together."""

    text: str
    start: int
    stop: int
    special: bool = False


def pieces(ids: Sequence[int], tokenizer: Any) -> list[Piece]:
    """The pieces of a sequence of token ids [T]; their texts together are what the tokenizer decodes."""
    special = special_ids(tokenizer)
    made: list[Piece] = []
    start = 0
    while start < len(ids):
        # decoders treat the first token of a text in its own way: the piece before stays in front
        before = made[-1].start if made else start
        front = _decoded(tokenizer, ids[before:start])
        for stop in range(start + 1, min(start + _LONGEST, len(ids)) + 1):
            whole = _decoded(tokenizer, ids[before:stop])
            alone = ids[start] in special or (stop < len(ids) and ids[stop] in special)
            if alone or not whole.endswith(_HALF):
                break
        text = whole[len(front) :] if whole.startswith(front) else _decoded(tokenizer, ids[start:stop])
        made.append(Piece(text, start, stop, ids[start] in special))
        start = stop
    return made


def special_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that are no text."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(i for i, token in added.items() if getattr(token, "special", False))}


def visible(text: str) -> str:
    """A text as it can be shown: what would steer a terminal or hide is written out, as "\\x1b"; line ends get a mark.

    A terminal obeys control characters, and marks of direction reorder what stands around them.
    """
    return "".join(_shown(character) for character in text)


def _shown(character: str) -> str:
    if character == "\n":
        return "⏎\n"
    if character == "\t":
        return "⇥"
    if character in _BREAKS or character in _DIRECTIONS or unicodedata.category(character) in ("Cc", "Cs"):
        code = ord(character)
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
    return character


def _decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
