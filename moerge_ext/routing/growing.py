"""Texts that `generate` makes longer: what is there at every step, one text per sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class GrowingTexts:
    """Queries, and the ids that `generate` has so far -> the queries with what was generated after them."""

    def __init__(self, texts: Sequence[str], tokenizer: Any, every: int):
        self.texts, self.tokenizer, self.every = texts, tokenizer, every
        self.prompt: Tensor | None = None  # of the `generate` that is going on

    def __call__(self, ids: Tensor) -> list[str] | None:
        """ids [sequences, length] -> a text per sequence; None when they need not be read again.

        They are read again after every `every` new tokens, and when another `generate` begins.
        """
        first, start = self.prompt is None, 0 if self.prompt is None else self.prompt.shape[1]
        if first or not torch.equal(ids[:, :start], self.prompt):
            self.prompt = ids.clone()
            return None if first else list(self.texts)
        if (ids.shape[1] - start) % self.every:
            return None
        copies = max(1, len(ids) // len(self.texts))  # beams, or one text for all
        new = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        return [self.texts[row // copies] + text for row, text in enumerate(new)]
