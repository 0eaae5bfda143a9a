"""Whether the batch of a forward has sequences for every row of affinities."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .state import RoutingState


class BatchCheck:
    """Refuses a forward of `model` whose batch does not share its sequences among `rows` evenly, until `remove`.

    Beams and several returned sequences give each row several neighbouring sequences. A layer itself sees only tokens,
    of which any number can divide evenly. Forwards of other requests and of the base alone are let through.
    """

    def __init__(self, model: nn.Module, rows: int, state: RoutingState):
        self.rows, self.state = rows, state
        self._hook = model.register_forward_pre_hook(self, with_kwargs=True)

    def remove(self) -> None:
        self._hook.remove()

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        request = self.state.of_forward()
        if not request.enabled or request.affinities is None or request.affinities.rows is not self:
            return
        inputs = [kwargs.get(key) for key in ("input_ids", "inputs_embeds", "decoder_input_ids")] + list(args[:1])
        batch = next((x.shape[0] for x in inputs if isinstance(x, torch.Tensor) and x.dim() > 1), self.rows)
        if batch % self.rows:
            raise ValueError(
                f"{self.rows} rows of affinities are set and the model got a batch of {batch}: give as many queries as "
                "sequences (or one for all)"
            )
