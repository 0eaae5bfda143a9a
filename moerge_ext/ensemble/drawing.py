"""Sampling in a batch in which every prompt has random numbers of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# What transformers' generate takes where a model's generation settings leave these out.
_DEFAULTS = {"top_k": 50}
_OWN = (
    ("temperature", "TemperatureLogitsWarper", lambda value: value != 1.0),
    ("top_h", "TopHLogitsWarper", lambda value: True),
    ("top_k", "TopKLogitsWarper", lambda value: value != 0),
    ("top_p", "TopPLogitsWarper", lambda value: value < 1.0),
    ("min_p", "MinPLogitsWarper", lambda value: True),
    ("typical_p", "TypicalLogitsWarper", lambda value: value < 1.0),
    ("epsilon_cutoff", "EpsilonLogitsWarper", lambda value: 0.0 < value < 1.0),
    ("eta_cutoff", "EtaLogitsWarper", lambda value: 0.0 < value < 1.0),
)


class DrawRows:
    """A logits processor: one token is drawn per row and all others are excluded, so that greedy search takes it.

    The rows of a batch belong to prompts, `counts[i]` rows in turn to prompt i, each of which draws with a generator of
    its own, seeded by `seeds[i]`: transformers' sampling draws all rows from one stream, where what a row gets depends
    on the rows before it.
    """

    def __init__(self, warpers: Any, counts: Sequence[int], seeds: Sequence[int]):
        self.warpers, self.counts = warpers, tuple(counts)
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        draws = [
            torch.rand(count, 1, generator=own, dtype=torch.float32, device="cpu")
            for count, own in zip(self.counts, self.generators, strict=True)
        ]
        return one_token(self.warpers(input_ids, scores.float()), torch.cat(draws)).to(scores.dtype)


def one_token(scores: Tensor, u: Tensor) -> Tensor:
    """Scores [N,V] that leave one token, the first whose cumulated probability is above u [N,1], uniform in [0, 1)."""
    up_to = scores.softmax(-1).cumsum(-1)
    # over the last one, so that it is 1 from the last possible token on, and above every u
    tokens = torch.searchsorted(up_to / up_to[:, -1:], u.to(scores.device), right=True)
    return torch.full_like(scores, -torch.inf).scatter(1, tokens, 0.0)


def own_warpers(settings: Any, device: torch.device) -> Any:
    """Those with which `generate(do_sample=True)` would draw by a model's generation settings, in its order."""
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process

    made = LogitsProcessorList()
    for name, kind, matters in _OWN:
        value = getattr(settings, name, None)
        value = _DEFAULTS.get(name) if value is None else value
        if value is not None and matters(value):
            more = {"device": device} if name == "eta_cutoff" else {}
            made.append(getattr(logits_process, kind)(value, **more))
    return made
