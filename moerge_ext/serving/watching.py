"""What is chosen in a step, kept while somebody wants to know: counts of all requests, traces of some.

Nothing is kept, and the branches take their shortest way, while `Tables.seen` is None.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .counts import Counts
from .requests import Choice
from .tables import Tables
from .traces import Traces


@dataclass(frozen=True)
class Chosen:
    """By one method in one module: weights [T,K] and experts [T,K] of the step's tokens, weight 0 where it chose none.

    method: None for weights that requests brought; masked: how many experts it could not choose there
    """

    module: str
    method: str | None
    weights: Tensor
    experts: Tensor
    masked: int


@dataclass
class Step:
    """One step's requests, in the order of its tokens, and what was chosen for them."""

    requests: Sequence[str]
    lengths: Sequence[int]
    found: list[Chosen] = field(default_factory=list)

    def add(self, module: str, method: str | None, weights: Tensor, experts: Tensor, masked: int = 0) -> None:
        tokens = int(sum(self.lengths))  # those after them are padding
        self.found.append(Chosen(module, method, weights[:tokens].float(), experts[:tokens], masked))


class Watcher:
    """Decides which steps are kept, and hands them on."""

    def __init__(self, tables: Tables, counts: Counts | None, traces: Traces | None):
        self.tables, self.counts, self.traces = tables, counts, traces

    def begin(self, requests: Sequence[str], lengths: Sequence[int], choices: Mapping[str, Choice]) -> None:
        """Before a step."""
        traced = self.traces is not None and self.traces.wants(requests)
        self.tables.seen = None
        if self.counts is not None:
            default = self.tables.methods[0]
            self.counts.add_tokens(default, [choices.get(name) for name in requests], lengths)
        if self.counts is not None or traced:
            self.tables.seen = Step(list(requests), [int(length) for length in lengths])

    def end(self) -> None:
        """After it."""
        step, self.tables.seen = self.tables.seen, None
        if step is None or not step.found:
            return
        with torch.no_grad():
            if self.counts is not None:
                self.counts.add(step)
            if self.traces is not None and self.traces.wants(step.requests):
                self.traces.add(step, self.tables.count)
