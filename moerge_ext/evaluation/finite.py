"""A model whose numbers are none says nothing: its answers end in an error, never in a score."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CAUSE = "weights or an adapter hold NaN or infinity, or numbers are beyond the range of the type (try another --dtype)"


class NoNumbers(ValueError):
    """Logits or log-likelihoods are not finite; `row`: the first of the batch, from 0."""

    def __init__(self, what: str, row: int):
        super().__init__(f"{what}: {CAUSE}")
        self.row = row


class CheckLogits:
    """A logits processor of transformers' generate that changes nothing; NoNumbers where a row has NaN or +infinity."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        wrong = ~(scores.amax(1) < torch.inf)
        if wrong.any():
            raise NoNumbers("the model's logits are NaN or infinite", int(wrong.nonzero()[0]))
        return scores


def checked(processors: Any) -> Any:
    """The logits processors, None for none, behind `CheckLogits`."""
    from transformers import LogitsProcessorList

    return LogitsProcessorList([CheckLogits(), *(processors or ())])


def check_values(values: Sequence[float], choices: Sequence[str]) -> None:
    """NoNumbers for the first of the log-likelihoods, one a choice, that is not finite."""
    for row, (value, choice) in enumerate(zip(values, choices, strict=True)):
        if not abs(value) < float("inf"):
            raise NoNumbers(f"the log-likelihood of {choice!r:.60} is {value}", row)
