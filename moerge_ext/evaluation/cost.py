"""What answers cost: time in the model, passes through it, texts embedded, texts written."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models.pretrained import is_seq2seq


@dataclass(frozen=True)
class Cost:
    """Sums over `answers` answers.

    seconds: in the model while it answers, `tokens`: read and written by it in that time; passes: of one sequence
    through the model, also those of a router that reads the model's hidden states or searches weights; embedded: texts
    that an embedder was given; written: texts that a language model was asked for. What an embedder or a writer has in
    its cache counts as asked for: the cost is the method's, not that of the order of the runs.
    """

    answers: int
    seconds: float
    tokens: float
    passes: float
    embedded: float
    written: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def each(self) -> dict[str, float]:
        """What one answer costs on average; "tokens_per_second" for all."""
        counts = {name: getattr(self, name) / self.answers for name in ("seconds", "passes", "embedded", "written")}
        return {"tokens_per_second": self.tokens_per_second, **counts}


NAMES = ("seconds", "tokens", "passes", "embedded", "written")


def cost_of(items: Iterable[Mapping[str, Any]]) -> Cost | None:
    """The cost that is kept with stored answers; None where an answer has none."""
    kept = [item.get("cost") for item in items]
    if not kept or None in kept:
        return None
    return Cost(len(kept), **{name: sum(cost[name] for cost in kept) for name in NAMES})


class Meter:
    """Counts what one model does until it is closed; `Answerer` tells it of the answers, a hook of all other passes."""

    def __init__(self, model: nn.Module, router: Any = None):
        self.router = router
        self.seconds = self.tokens = self.passes = 0.0
        self._answering = False
        # a part that every pass runs once, and that embedders of hidden states call by itself
        part = model.get_encoder() if is_seq2seq(model.config) else getattr(model, "base_model", model)
        self._hook = part.register_forward_pre_hook(self._pass, with_kwargs=True)

    def __enter__(self) -> Meter:
        return self

    def __exit__(self, *exc: object) -> None:
        self._hook.remove()

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A block in which the model answers; its passes are said by `add`."""
        self._answering, start = True, time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            self._answering = False

    def add(self, tokens: int, passes: int) -> None:
        """Count what an answer took."""
        self.tokens += tokens
        self.passes += passes

    def _pass(self, _model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if self._answering:
            return
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 1]
        self.passes += given[0].shape[0] if given else 1

    def read(self) -> dict[str, float]:
        """The counts so far."""
        parts = (getattr(self.router, name, None) for name in ("embedder", "writer"))
        embedded, written = (float(getattr(part, "asked", {}).get("texts", 0)) for part in parts)
        values = (self.seconds, self.tokens, self.passes, embedded, written)
        return dict(zip(NAMES, values, strict=True))


def since(before: Mapping[str, float], now: Mapping[str, float], answers: int) -> dict[str, float]:
    """What each of `answers` answers has cost between two readings."""
    return {name: round((now[name] - before[name]) / max(1, answers), 6) for name in NAMES}
