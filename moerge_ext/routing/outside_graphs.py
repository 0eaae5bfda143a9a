"""`torch.compiler.disable`, when a first model is patched: importing the compiler takes longer than importing torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_MARKED: list[tuple[list[Callable], str]] = []


def outside_of_graphs(reason: str) -> Callable[[Callable], Callable]:
    """Once `keep_outside` ran, the function is never traced: a graph breaks before it, or is refused with `reason`."""

    def decorate(function: Callable) -> Callable:
        called = [function]
        _MARKED.append((called, reason))

        @functools.wraps(function)
        def outside(*args: Any, **kwargs: Any) -> Any:
            return called[0](*args, **kwargs)

        return outside

    return decorate


def keep_outside() -> None:
    """Disables the compiler for all that is marked so far."""
    while _MARKED:
        called, reason = _MARKED.pop()
        called[0] = torch.compiler.disable(called[0], reason=reason)
