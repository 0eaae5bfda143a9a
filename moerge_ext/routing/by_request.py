"""Routed layers that have no short way: every forward asks for its request."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .state import IDLE
from .threads import REQUESTS


class ByRequest:
    """Before `RoutedLinear` among the bases of a class with `_with_request(x, request, ...)`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self._compiled_forward(x, *args, **kwargs)
        request = self.state.current() if REQUESTS.get() or self.state.busy else IDLE
        return self._with_request(x, request, *args, **kwargs)

    def _compiled_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        request = self.state.shown()
        if request is None:
            return self._outside_of_graphs(x, *args, **kwargs)
        return self._with_request(x, request, *args, **kwargs)
