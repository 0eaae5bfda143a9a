"""What a server's requests were routed to, summed since it started: the numbers behind `/metrics`.

entropy of a token in a module = -sum_k p_k log p_k, p_k = |w_k| / sum_j |w_j| over the experts chosen for it (nats)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .requests import Choice

TOTALS = ("entropy", "routed", "candidates", "masked")  # summed over tokens and modules
AT_ONCE = 1 << 20  # weights
WEIGHTED, UNROUTED = "given", "none"  # of tokens whose request brought weights, or switched routing off


class Counts:
    """The sums of one worker, over its modules; `names` are the experts that ids mean from now on."""

    def __init__(self, names: Sequence[str], slots: int):
        self._names, self._slots = tuple(names), slots
        self._load: dict[str, list[float]] = {}  # {expert: [weight, choices]} of earlier ids
        self._open: Tensor | None = None  # [2, slots] of these
        self._sums: Tensor | None = None  # of these: entropy, routed, masked
        self._totals = [0.0] * len(TOTALS)
        self.tokens: dict[str, int] = {}  # {how they were routed: tokens}

    def rename(self, names: Sequence[str]) -> None:
        """Ids mean other experts from now on."""
        self._close()
        self._names = tuple(names)

    def add_tokens(self, default: str, choices: Sequence[Choice | None], lengths: Sequence[int]) -> None:
        for choice, length in zip(choices, lengths, strict=True):
            how = default if choice is None else choice.method
            if how is None:
                how = UNROUTED if choice.weights is None else WEIGHTED
            self.tokens[how] = self.tokens.get(how, 0) + int(length)

    def add(self, step: Any) -> None:
        """A `Step`: what methods chose; what requests bring is no choice."""
        alike: dict[tuple[str, int], list[Any]] = {}
        for one in step.found:
            if one.method is not None:
                alike.setdefault((one.method, one.weights.shape[1]), []).append(one)
        for group in alike.values():
            many = max(1, AT_ONCE // max(1, group[0].weights.numel()))
            for at in range(0, len(group), many):
                self._add(group[at : at + many])

    def _add(self, group: list[Any]) -> None:
        weights = torch.stack([one.weights for one in group]).abs().nan_to_num(0.0, 0.0)  # [modules,T,K]
        ids = torch.stack([one.experts for one in group]).flatten()
        if self._open is None:
            self._open = torch.zeros(2, self._slots, dtype=torch.float64, device=weights.device)
            self._sums = torch.zeros(3, dtype=torch.float64, device=weights.device)
        flat = weights.flatten().double()
        self._open[0].index_add_(0, ids, flat)
        self._open[1].index_add_(0, ids, (flat != 0).double())
        total = weights.sum(2, keepdim=True)
        parts = weights / total.clamp_min(torch.finfo(torch.float32).tiny)
        routed = (total > 0).sum((1, 2)).double()  # [modules]
        masked = torch.tensor([one.masked for one in group], dtype=torch.float64, device=routed.device)
        sums = (torch.special.entr(parts).sum(dtype=torch.float64), routed.sum(), (routed * masked).sum())
        self._sums += torch.stack(sums)

    def _close(self) -> None:
        if self._open is None:
            return
        for name, weight, count in zip(self._names, *self._open.tolist(), strict=False):
            held = self._load.setdefault(name, [0.0, 0])
            held[0] += weight
            held[1] += int(count)
        entropy, routed, masked = self._sums.tolist()
        found = (entropy, routed, routed * len(self._names), masked)
        self._totals = [total + new for total, new in zip(self._totals, found, strict=True)]
        self._open = self._sums = None

    def read(self) -> dict[str, Any]:
        """The sums, as plain data; `experts` {expert: [sum of its weights, how often it was chosen]}."""
        self._close()
        for name in self._names:
            self._load.setdefault(name, [0.0, 0])
        return {"experts": self._load, "tokens": self.tokens} | dict(zip(TOTALS, self._totals, strict=True))
