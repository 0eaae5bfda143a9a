"""The tokens at which an answer ends: one rule for training, which writes one, and generation, which waits for it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any


def end_tokens(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer; a text that is learned or scored ends with the first.

    Those of the model's generation config, for which `generate` waits, the tokenizer's own first when it is one of
    them; the tokenizer's where the model names none; none where neither does. A warning names both when generation
    does not wait for the tokenizer's.
    """
    own = tokenizer.eos_token_id
    waited = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    if waited is None:
        waited = getattr(getattr(model, "config", None), "eos_token_id", None)
    if waited is None:
        return () if own is None else (own,)
    ids = tuple(waited) if isinstance(waited, (list, tuple)) else (int(waited),)
    if own in ids:
        return (own, *(token for token in ids if token != own))
    if own is not None:
        named = ", ".join(f"{token} ({tokenizer.convert_ids_to_tokens(token)!r})" for token in ids)
        warnings.warn(
            f"the tokenizer ends texts with {own} ({tokenizer.convert_ids_to_tokens(own)!r}), the model's generation "
            f"waits for {named}: answers end with {ids[0]}, in training and in evaluation",
            stacklevel=3,
        )
    return ids


def turn_ends(tokenizer: Any, ends: Sequence[int]) -> tuple[int, ...]:
    """`ends` for an answer of a chat: that first which the chat template writes behind one, if it writes any of them.

    Gemma's tokenizer ends texts with <eos>, its template turns with <end_of_turn>; generation waits for both.
    """
    return _turn_ends(tokenizer, str(getattr(tokenizer, "chat_template", None)), tuple(ends))


@lru_cache(maxsize=4)
def _turn_ends(tokenizer: Any, template: str, ends: tuple[int, ...]) -> tuple[int, ...]:
    mark = "xyzzy"
    messages = [{"role": "user", "content": mark}, {"role": "assistant", "content": mark}]
    try:
        said = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # without a template, or with one that refuses this: the chat itself says so
        return ends
    behind = tokenizer(said.rpartition(mark)[2], add_special_tokens=False).input_ids
    first = next((token for token in behind if token in ends), None)
    return ends if first is None else (first, *(token for token in ends if token != first))


def target_ids(tokenizer: Any, text: str, ends: Sequence[int], *, seq2seq: bool) -> list[int]:
    """Token ids of an answer, with the end that `end_tokens` says, or its own where it brings one."""
    if not seq2seq:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        return ids if ids and ids[-1] in ends else ids + list(ends[:1])
    ids = tokenizer(text_target=text).input_ids
    foreign = ids[-1:] == [tokenizer.eos_token_id] and tokenizer.eos_token_id not in ends
    return [*ids[:-1], *ends[:1]] if foreign and ends else ids
