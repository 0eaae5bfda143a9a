"""Which experts answered a request, token by token: kept for the last requests that asked for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class Trace:
    """One sequence of a request. sums: [tokens,E], every expert's weights summed over modules; start: the position of
    the first, after what the prefix cache had; modules: {module: [E] sums over the tokens that were computed}, of which
    there are `computed`: one that was computed again counts again."""

    names: tuple[str, ...]
    prompt: int
    start: int = 0
    sums: Tensor | None = None
    modules: dict[str, Tensor] = field(default_factory=dict)
    computed: int = 0

    def put(self, position: int, sums: Tensor) -> None:
        """Rows of the tokens from `position` on; a token that is computed again takes the place of its first time."""
        if self.sums is None:
            self.start, self.sums = position, sums
            return
        if position < self.start:  # put back, and more of it computed anew than the cache had left out
            self.sums = torch.cat([sums.new_zeros(self.start - position, sums.shape[1]), self.sums])
            self.start = position
        kept = self.sums[: position - self.start]
        after = self.sums[position - self.start + len(sums) :]
        self.sums = torch.cat([kept, sums, after])


class Traces:
    """The traces of the last `limit` sequences of a worker. names: the experts, as ids mean them from now on."""

    def __init__(self, names: Sequence[str], limit: int):
        self.names, self.limit = tuple(names), limit
        self._held: dict[str, Trace] = {}  # {sequence: its trace}, the oldest first
        self._keys: dict[str, str] = {}  # {sequence: the request that the client knows}
        self._positions: dict[str, int] = {}  # of the first token of each sequence in the coming step

    def open(self, sequence: str, request: str, prompt: int) -> None:
        """A sequence that is to be traced; the oldest makes room for it."""
        self._held.pop(sequence, None)
        while len(self._held) >= self.limit:
            gone = next(iter(self._held))
            del self._held[gone], self._keys[gone]
        self._held[sequence], self._keys[sequence] = Trace(self.names, prompt), request

    def wants(self, sequences: Sequence[str]) -> bool:
        return bool(self._held) and any(name in self._held for name in sequences)

    def at(self, positions: Mapping[str, int]) -> None:
        """Where the sequences of the coming step are."""
        self._positions = dict(positions) if self._held else {}

    def add(self, step: Any, count: int) -> None:
        """A `Step` of `count` experts."""
        tokens, at = int(sum(step.lengths)), 0
        sums = torch.zeros(tokens, count, dtype=torch.float32, device="cpu")
        by_module: dict[str, Tensor] = {}
        for one in step.found:
            dense = torch.zeros(tokens, max(count, int(one.experts.max()) + 1), dtype=torch.float32, device="cpu")
            dense.scatter_add_(1, one.experts.long().cpu(), one.weights.cpu())
            sums += dense[:, :count]
            held = by_module.get(one.module)
            by_module[one.module] = dense[:, :count] if held is None else held + dense[:, :count]
        for name, length in zip(step.requests, step.lengths, strict=True):
            if (trace := self._held.get(name)) is not None:
                rows = slice(at, at + length)
                trace.put(self._positions.get(name, 0), sums[rows])
                trace.computed += length
                for module, dense in by_module.items():
                    mine = dense[rows].sum(0)
                    trace.modules[module] = trace.modules.get(module, 0) + mine
            at += length

    def read(self, request: str) -> list[dict[str, Any]]:
        """The traces of a request's sequences, as plain data; tokens: the mean over the modules here."""
        return [self._read(trace) for name, trace in self._held.items() if _is_of(self._keys[name], request)]

    def _read(self, trace: Trace) -> dict[str, Any]:
        rows = [] if trace.sums is None else (trace.sums / max(1, len(trace.modules))).tolist()
        modules = {module: (sums / max(1, trace.computed)).tolist() for module, sums in trace.modules.items()}
        said = {"experts": list(trace.names), "prompt_tokens": trace.prompt, "start": trace.start}
        return said | {"tokens": rows, "modules": modules}


def _is_of(key: str, request: str) -> bool:
    """Whether vLLM's name for one prompt of a request is that request's: `cmpl-x` has `cmpl-x-0`, `cmpl-x-1`, ..., and
    of other ways in `resp_x` has `resp_x_0`.
    """
    rest = key.removeprefix(request)
    return key == request or (key != rest and rest[:1] in ("-", "_") and rest[1:].isdigit())
