"""What the requests of a step say of their routing, for each of its packed tokens.

Row r of every table is the r-th request of the step; one more row is for tokens of padding, which no expert touches.
All tensors keep their addresses, so that a captured graph reads what the next step has written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .requests import Choice


class Tables:
    """The rows of the tokens of a step, and what each row's request asks for.

    plain: True while every request of the step is routed by the default method and none brings affinities
    """

    def __init__(
        self,
        num_experts: int,
        methods: Mapping[str, Callable[[Tensor], Tensor] | None],
        *,
        max_requests: int,
        max_tokens: int,
        device: torch.device,
        fixed: bool = False,
        spare: int = 0,
    ):
        """methods: {method: what makes a score bias [N,E] of affinities [N,E], None for those that add none}, the
        default first. fixed: graphs are captured, so that a step may not leave out what it does not need. spare: slots
        after those of the experts, masked where `allowed` is asked for."""
        self.methods, self.fixed = tuple(methods), fixed
        self._biases = dict(methods)
        self._may_be_plain = not fixed and self._biases[self.methods[0]] is None
        self.plain = self._may_be_plain
        self._pad, self.device = max_requests, device
        self.count = num_experts
        shape = (max_requests + 1, num_experts + spare)
        self._rows = torch.full((max_tokens,), self._pad, dtype=torch.int32, device=device)
        self.weights = torch.zeros(shape, device=device, dtype=torch.float32)
        self.experts = torch.arange(shape[1], dtype=torch.int32, device=device).repeat(shape[0], 1)
        self.bias = {
            name: torch.zeros(shape, device=device, dtype=torch.float32) for name, make in methods.items() if make
        }
        self._allowed = {name: torch.zeros(shape, dtype=torch.bool, device=device) for name in methods}
        self._masked: dict[tuple[str, bytes], tuple[Tensor, Tensor]] = {}
        self.used = dict.fromkeys(methods, True)  # whether any request of the step is routed by the method
        self.weighted = True  # whether any brings weights
        self.seen: Any = None  # collects what a step chooses (`watching.Step`) while somebody wants to know
        self._view: Tensor | None = None
        self._used = 0  # tokens of the step

    def rows(self, tokens: int) -> Tensor:
        """[T] int32, the row of every token of a step of T tokens, with padding.

        RuntimeError for fewer than the step has: nobody says of which requests they are.
        """
        if tokens < self._used:
            raise RuntimeError(
                f"moerge: a layer with experts was given {tokens} tokens of a step of {self._used}, so that which "
                "request each is of is not known: start with the routing of requests off"
            )
        if self._view is None or self._view.shape[0] != tokens:
            self._view = self._rows[:tokens]
        return self._view

    def allowed(self, method: str, mask: Tensor | None) -> Tensor:
        """[rows,E] bool: which experts a method may choose for each row, in modules with that `mask` [E]."""
        if mask is None:
            return self._allowed[method]
        key = (method, mask.cpu().numpy().tobytes())
        if key not in self._masked:
            self._masked[key] = (mask, self._allowed[method] & mask)
        return self._masked[key][1]

    def change(self, count: int, biases: Mapping[str, Callable[[Tensor], Tensor] | None]) -> None:
        """Before the slots hold others, `count` experts: `allowed` must be asked for every mask again after it."""
        self.count = count
        self._biases |= biases
        self._masked.clear()

    def begin(self, choices: Sequence[Choice | None], lengths: Sequence[int]) -> None:
        """The step of requests with these choices (None: the default) and numbers of tokens, in the tokens' order."""
        default = self.methods[0]
        routed = [default if choice is None else choice.method for choice in choices]
        self.plain = self._may_be_plain and all(choice is None for choice in choices)
        if self.plain:
            return
        self.used = {name: self.fixed or name in routed for name in self.methods}
        self._write_rows(lengths)
        count = len(choices)
        for name, table in self._allowed.items():
            self._put(table[:count, 0], [method == name for method in routed])
            table[:count] = table[:count, :1].clone()
        weighted = [choice is not None and choice.weights is not None for choice in choices]
        self.weighted = self.fixed or any(weighted)
        self.weights[:count] = 0.0
        for row, choice in enumerate(choices):
            if weighted[row]:
                self._put(self.weights[row, : len(choice.weights)], choice.weights)
            if choice is not None and choice.affinities is not None:
                affinities = torch.tensor(choice.affinities, dtype=torch.float32, device="cpu")[None]
                bias = self._biases[choice.method](affinities)[0]
                self.bias[choice.method][row, : len(bias)].copy_(bias, non_blocking=True)
        for (name, _), (mask, table) in self._masked.items():
            torch.logical_and(self._allowed[name], mask, out=table)

    def end(self) -> None:
        """After the step: what runs until the next one is no request's."""
        self._used = 0

    def _write_rows(self, lengths: Sequence[int]) -> None:
        used = self._used = int(sum(lengths))
        rows = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        self._rows[:used].copy_(torch.from_numpy(rows), non_blocking=True)
        self._rows[used:] = self._pad

    def _put(self, where: Tensor, values: Sequence[float] | Sequence[bool]) -> None:
        where.copy_(torch.tensor(values, dtype=where.dtype, device="cpu"), non_blocking=True)
