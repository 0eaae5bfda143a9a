"""MOERGE_LOG_CALLS: what the ops were called with, for whoever reports a bug.

    MOERGE_LOG_CALLS=shapes   every call on standard error: op, shapes, types, options, time
    MOERGE_LOG_CALLS=FILE     the arguments of the last call that failed, written to FILE;
                              `python -m moerge_ext.ops.replay FILE` makes that call again

Read once, when the ops are imported; unset, nothing of this runs. Calls inside of a compiled graph are not seen.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

VARIABLE, SHAPES = "MOERGE_LOG_CALLS", "shapes"
FORMAT = "moerge-call"


def watched(op: Any) -> Any:
    """`op` itself, or what logs its calls where the environment asks for that."""
    wish = os.environ.get(VARIABLE, "")
    return Watched(op, wish) if wish else op


class Watched:
    """An op that prints its calls, or keeps the arguments of one that fails."""

    def __init__(self, op: Any, wish: str):
        self.op, self.__name__ = op, op.__name__
        self._run: Callable = self._printed if wish == SHAPES else self._kept
        self._file = wish

    def __call__(self, *args: Any) -> Any:
        return self.op(*args) if torch.compiler.is_compiling() else self._run(*args)

    def _printed(self, *args: Any) -> Any:
        start = time.perf_counter()
        ended = "failed"
        try:
            result = self.op(*args)
            ended = "took"
            return result
        finally:
            _wait(args)
            spent = 1e6 * (time.perf_counter() - start)
            print(f"{described(self.op, args)} {ended} {spent:.0f} us", file=sys.stderr, flush=True)

    def _kept(self, *args: Any) -> Any:
        try:
            return self.op(*args)
        except Exception as error:
            kept = [a.detach().cpu() if isinstance(a, Tensor) else a for a in args]
            said = {"format": FORMAT, "op": _name(self.op), "args": kept, "error": str(error).partition("\n")[0]}
            devices = [str(a.device) if isinstance(a, Tensor) else None for a in args]
            torch.save(said | {"devices": devices, "torch": str(torch.__version__)}, self._file)
            print(f"moerge_ext: the arguments of the failed call are in {self._file}", file=sys.stderr)
            raise


def _wait(args: Sequence[Any]) -> None:
    """Until the device has done what was launched, so that the time is that of the call."""
    if any(isinstance(a, Tensor) and a.is_cuda for a in args):
        torch.cuda.synchronize()


def _name(op: Any) -> str:
    return op.__name__.split(".")[0]


def described(op: Any, args: Sequence[Any]) -> str:
    """A call as text: moerge::route(x float32 [4, 8], gates float32 [3, 8] strides (1, 3), top_k=2, ...)."""
    names = [argument.name for argument in op._schema.arguments]
    parts = []
    for name, value in zip(names, args, strict=False):
        if isinstance(value, Tensor):
            strides = "" if value.is_contiguous() else f" strides {value.stride()}"
            place = "" if value.is_cpu else f" on {value.device}"
            parts.append(f"{name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}{strides}{place}")
        else:
            parts.append(f"{name}={value!r}")
    return f"moerge::{_name(op)}({', '.join(parts)})"
