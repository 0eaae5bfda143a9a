"""A trace that also keeps the sequences of a batch apart."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .rows import Rows
from .trace import Trace


class RowTrace(Trace):
    """A `Trace` of forwards with `count` sequences each, whose routing weights are also summed for every sequence.

    A call of a module whose tokens cannot be told apart by sequence (see `Rows`) counts in the trace and for no row.

    live: [count] bool, the rows that still count (None: all); `generate` feeds a sequence that has ended with padding
    until the last one has.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        model: nn.Module,
        count: int,
        applies: Callable[[Trace], bool],
        tokens: bool = False,
    ):
        if count < 1:
            raise ValueError(f"record(rows=...) takes the number of sequences in a batch, at least 1; got {count}")
        super().__init__(names, tokens)
        self.count, self.live = count, None
        self._by_row: Tensor | None = None
        self._rows = Rows(model, count, lambda _: applies(self)) if count > 1 else None

    def remove(self) -> None:
        """Takes its hooks off the model."""
        if self._rows is not None:
            self._rows.remove()

    def row_share(self) -> Tensor:
        """[count,E] float64: each expert's part of a row's routing weight, over all modules; 0 where none counted."""
        if self._by_row is None:
            return torch.zeros(self.count, len(self.names), dtype=torch.float64, device="cpu")
        total = self._by_row.cpu()
        return total / total.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)

    def _add(
        self,
        module: str,
        weights: Tensor,
        experts: Tensor,
        real: Tensor | None,
        x: Tensor | None = None,
        token: Tensor | None = None,
    ) -> None:
        super()._add(module, weights, experts, real)
        row = self._row_of(module, x, token)
        if row is None:
            return
        counted = torch.ones_like(row, dtype=torch.bool) if real is None else real
        if self.live is not None:
            counted = counted & self.live.to(row.device)[row]
        if self._by_row is None:
            with torch.inference_mode(False):
                self._by_row = torch.zeros(self.count, len(self.names), dtype=torch.float64, device=weights.device)
        places = row[:, None] * len(self.names) + experts.long()
        by_row = self._by_row.to(weights.device)
        by_row.view(-1).scatter_add_(0, places.flatten(), (weights.double() * counted[:, None]).flatten())
        self._by_row = by_row

    def _row_of(self, module: str, x: Tensor | None, token: Tensor | None) -> Tensor | None:
        """[T] int64, the row of every line of weights; None where that cannot be told."""
        if x is None:
            return None
        tokens, rows = x.shape[:-1].numel(), None
        if self._rows is not None:
            try:
                rows = self._rows.of(module, x)
            except ValueError:
                return None
        if rows is None:
            if tokens % self.count:
                return None
            rows = torch.arange(tokens, device=x.device) // max(1, tokens // self.count)
        return rows.long() if token is None else rows.long()[token]
